"""What is true in the synthetic world of its things: their kinds, homes and uses, people's work, and places."""
# ruff: noqa: E501

from __future__ import annotations

# name | kind | where it lives | what it can do | what it eats | what covers it
ANIMALS = """
dog|mammal|kennel|bark|meat|fur
cat|mammal|house|purr|fish|fur
cow|mammal|barn|give milk|grass|hair
horse|mammal|stable|gallop|hay|hair
sheep|mammal|meadow|bleat|grass|wool
goat|mammal|hillside|climb rocks|leaves|hair
pig|mammal|sty|roll in mud|scraps|skin
lion|mammal|savanna|roar|meat|fur
tiger|mammal|jungle|stalk deer|meat|fur
bear|mammal|cave|catch salmon|berries|fur
wolf|mammal|den|howl|meat|fur
fox|mammal|burrow|hunt mice|mice|fur
rabbit|mammal|burrow|hop|carrots|fur
squirrel|mammal|tree|store nuts|nuts|fur
mouse|mammal|hole|squeak|cheese|fur
bat|mammal|cave|fly at night|moths|fur
whale|mammal|ocean|sing under water|krill|skin
dolphin|mammal|ocean|leap from water|fish|skin
seal|mammal|icy shore|slide on ice|fish|fur
elephant|mammal|savanna|spray water|leaves|skin
giraffe|mammal|savanna|reach tall trees|leaves|fur
monkey|mammal|jungle|swing on branches|bananas|fur
camel|mammal|desert|carry loads|dry grass|hair
kangaroo|mammal|grassland|carry a baby in a pouch|grass|fur
beaver|mammal|river|build dams|bark of trees|fur
owl|bird|hollow tree|hoot|mice|feathers
eagle|bird|mountain|soar high|fish|feathers
robin|bird|nest|sing|worms|feathers
hen|bird|coop|lay eggs|grain|feathers
duck|bird|pond|quack|water plants|feathers
penguin|bird|icy coast|swim but not fly|fish|feathers
parrot|bird|rain forest|copy words|seeds|feathers
woodpecker|bird|forest|drill holes in wood|beetles|feathers
ostrich|bird|dry plain|run very fast|plants|feathers
salmon|fish|stream|swim upstream|small fish|scales
shark|fish|sea|smell blood|seals|scales
goldfish|fish|fishbowl|swim in circles|flakes|scales
trout|fish|lake|jump for flies|insects|scales
snake|reptile|grassy den|slither|rats|scales
turtle|reptile|marsh|hide in its shell|weeds|a shell
lizard|reptile|rocks|drop its tail|bugs|scales
crocodile|reptile|swamp|float like a log|zebras|scales
frog|amphibian|ponds edge|croak|flies|wet skin
toad|amphibian|damp soil|leap|slugs|bumpy skin
bee|insect|hive|make honey|nectar|fuzz
ant|insect|ant hill|carry crumbs|sugar|a hard shell
butterfly|insect|flower garden|flutter|nectar|tiny scales
spider|arachnid|web|spin silk|flies|fine hair
crab|crustacean|tide pool|walk sideways|algae|a hard shell
snail|mollusk|damp garden|crawl slowly|lettuce|a shell
"""

# name | kind | what it is for | where it is kept | what it is made of
OBJECTS = """
hammer|tool|drive nails|toolbox|steel
saw|tool|cut wood|workshop|steel
screwdriver|tool|turn screws|toolbox|steel
wrench|tool|tighten bolts|garage|iron
drill|tool|make holes|workshop|metal
ladder|tool|reach high places|garage|aluminum
shovel|tool|dig holes|shed|iron
rake|tool|gather leaves|shed|wood
axe|tool|chop logs|shed|iron
paintbrush|tool|spread paint|workshop|hair and wood
tape measure|tool|measure length|toolbox|metal
needle|tool|sew cloth|sewing box|steel
scissors|tool|cut paper|desk drawer|steel
knife|kitchen tool|slice bread|kitchen drawer|steel
spoon|kitchen tool|eat soup|kitchen drawer|metal
fork|kitchen tool|pick up noodles|kitchen drawer|metal
cup|dish|drink tea|cupboard|clay
bowl|dish|hold cereal|cupboard|clay
plate|dish|serve dinner|cupboard|china
pan|kitchen tool|fry eggs|stove|iron
pot|kitchen tool|boil water|stove|steel
kettle|kitchen tool|heat water for tea|stove|metal
oven|appliance|bake bread|kitchen|metal
refrigerator|appliance|keep food cold|kitchen|metal
freezer|appliance|make ice|basement|metal
toaster|appliance|brown slices of bread|kitchen counter|metal
blender|appliance|mix smoothies|kitchen counter|glass
washing machine|appliance|clean clothes|laundry room|metal
iron|appliance|smooth wrinkled shirts|laundry room|metal
vacuum cleaner|appliance|clean carpets|closet|plastic
broom|cleaning tool|sweep floors|closet|straw
mop|cleaning tool|wash floors|closet|cotton
sponge|cleaning tool|wipe dishes|sink|foam
soap|cleaner|wash hands|sink|fat and oil
towel|cloth|dry the body|bathroom|cotton
toothbrush|bathroom tool|clean teeth|bathroom|plastic
comb|bathroom tool|tidy hair|bathroom|plastic
mirror|furniture|see your face|bathroom|glass
bed|furniture|sleep at night|bedroom|wood
pillow|bedding|rest the head|bedroom|feathers
blanket|bedding|stay warm in bed|bedroom|wool
lamp|furniture|light a room|desk|glass
chair|furniture|sit down|dining room|wood
sofa|furniture|relax with friends|living room|cloth
table|furniture|hold plates for a meal|dining room|wood
bookcase|furniture|store books|study|wood
clock|device|tell time|wall|plastic
telephone|device|talk to someone far away|office|plastic
computer|device|write programs|office|plastic
camera|device|take pictures|camera bag|glass and plastic
television|device|watch shows|living room|glass
radio|device|hear the news|kitchen shelf|plastic
flashlight|device|see in the dark|camping bag|plastic
umbrella|covering|stay dry in rain|hallway|nylon
raincoat|clothing|keep rain off|hallway|rubber
coat|clothing|stay warm in winter|closet|wool
scarf|clothing|warm the neck|closet|wool
gloves|clothing|warm the fingers|coat pocket|wool
boots|clothing|walk through snow|hallway|leather
hat|clothing|shade the face|hat rack|straw
belt|clothing|hold up pants|closet|leather
socks|clothing|keep feet warm|dresser|cotton
pencil|school supply|draw sketches|pencil case|wood
pen|school supply|sign letters|desk|plastic
eraser|school supply|remove pencil marks|pencil case|rubber
ruler|school supply|draw straight lines|pencil case|wood
backpack|bag|carry school books|locker|nylon
suitcase|bag|pack clothes for a trip|attic|leather
basket|container|carry fruit|pantry|straw
bucket|container|carry water|shed|plastic
bottle|container|hold juice|refrigerator door|glass
wallet|container|carry money|pocket|leather
key|device|open locks|key ring|brass
rope|tool|tie a boat|dock|hemp
net|tool|catch fish|fishing boat|string
fishing rod|tool|catch trout|boathouse|wood
tent|shelter|sleep in the woods|campsite|canvas
sleeping bag|bedding|keep warm while camping|tent|nylon
match|tool|light a fire|match box|wood
candle|light|give light without power|candle holder|wax
map|guide|find the way|glove box|paper
compass|device|find north|hiking bag|brass
telescope|device|look at stars|observatory|glass
microscope|device|see tiny cells|laboratory|glass
thermometer|device|measure temperature|medicine cabinet|glass
scale|device|weigh things|grocery counter|metal
bandage|supply|cover a cut|medicine cabinet|cloth
glasses|device|read small print|glasses case|glass
whistle|device|start a race|coach's pocket|metal
guitar|instrument|play chords|music room|wood
piano|instrument|play songs with keys|concert hall|wood
drum|instrument|keep the beat|band room|wood
violin|instrument|play with a bow|orchestra room|wood
trumpet|instrument|play a fanfare|band room|brass
ball|toy|play catch|gym|rubber
kite|toy|fly in the wind|toy chest|paper
puzzle|toy|join small pieces into a picture|game shelf|cardboard
bicycle|vehicle|ride on two wheels|bike rack|steel
car|vehicle|drive to work|driveway|steel
bus|vehicle|carry many riders in town|bus station|steel
train|vehicle|travel on rails|railway|steel
boat|vehicle|cross a lake|harbor|wood
airplane|vehicle|fly between countries|airport|aluminum
truck|vehicle|haul heavy goods|warehouse|steel
ambulance|vehicle|rush sick people to care|hospital|steel
sled|vehicle|slide down snow|snowy hill|wood
wheelbarrow|vehicle|move dirt|garden shed|metal
"""

# name | kind | color | taste | where it grows or comes from
FOODS = """
apple|fruit|red|sweet|apple tree
banana|fruit|yellow|sweet|banana plant
lemon|fruit|yellow|sour|lemon tree
lime|fruit|green|sour|lime tree
orange|fruit|orange|juicy|orange tree
grape|fruit|purple|sweet|vine
cherry|fruit|red|tart|cherry tree
blueberry|fruit|blue|sweet|bush
strawberry|fruit|red|sweet|strawberry patch
pumpkin|vegetable|orange|mild|pumpkin patch
carrot|vegetable|orange|crunchy|soil
potato|vegetable|brown|starchy|soil
onion|vegetable|white|sharp|soil
spinach|vegetable|green|leafy|field
pea|vegetable|green|sweet|pod
corn|grain|yellow|sweet|stalk
rice|grain|white|plain|wet field
wheat|grain|gold|nutty|dry field
cheese|dairy food|yellow|salty|milk
butter|dairy food|pale yellow|creamy|milk
yogurt|dairy food|white|tangy|milk
honey|sweetener|golden|very sweet|beehive
sugar|sweetener|white|very sweet|sugar cane
salt|seasoning|white|salty|sea water
pepper|seasoning|black|spicy|pepper vine
chocolate|sweet|dark brown|bitter sweet|cocoa bean
coffee|drink|dark brown|bitter|coffee bean
tea|drink|amber|mild|tea leaf
bread|baked food|brown|plain|flour
egg|food|white|rich|hen
"""

# person | what they do | where they work | what they use
JOBS = """
doctor|treat sick people|clinic|stethoscope
nurse|care for patients|hospital ward|thermometer
teacher|teach students|school|chalkboard
baker|bake bread and cakes|bakery|oven
chef|cook meals|restaurant|frying pan
farmer|grow crops|farm|tractor
pilot|fly airplanes|cockpit|control stick
sailor|sail ships|ship|compass
carpenter|build wooden furniture|workshop|saw
plumber|fix leaking pipes|flooded homes|pipe wrench
electrician|repair wires|power station|wire cutter
firefighter|put out fires|fire station|water hose
police officer|catch thieves|police station|handcuffs
judge|decide cases|courtroom|gavel
lawyer|argue cases|law office|law books
librarian|lend books|library|catalog
dentist|clean teeth|dental office|small mirror
vet|heal animals|animal clinic|pet carrier
painter|paint pictures|studio|easel
tailor|sew suits|tailor shop|sewing machine
barber|cut hair|barber shop|clippers
gardener|tend flowers|greenhouse|watering can
miner|dig for coal|mine|pickaxe
astronomer|study stars|observatory|telescope
chemist|mix chemicals|laboratory|test tube
writer|write novels|quiet study|typewriter
musician|play concerts|concert stage|violin
cashier|take payments|supermarket|cash register
mechanic|repair engines|garage|wrench
fisherman|catch fish|harbor|net
"""

# place | what people do there
PLACES = """
library|borrow books
bakery|buy fresh bread
hospital|get well
school|learn to read
bank|keep money safe
post office|mail letters
airport|board a plane
museum|look at old art
zoo|see wild animals
park|have a picnic
gym|lift weights
cinema|watch a film
pharmacy|buy medicine
restaurant|order a meal
theater|watch a play
stadium|watch a football match
beach|build sand castles
swimming pool|swim laps
farm|raise animals
forest|walk among trees
hotel|rent a room
gas station|fill the tank
barber shop|get a haircut
hardware store|buy nails
pet store|buy a hamster
playground|use swings
church|attend a wedding
kitchen|cook dinner
bathroom|take a shower
garage|park the car
"""
