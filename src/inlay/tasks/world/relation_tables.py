"""What is true in the synthetic world between things: effects, parts, opposites, and what fits where."""

from __future__ import annotations

# cause | effect
EFFECTS = """
ice is left in the sun|it melts
water is cooled below freezing|it turns to ice
water is boiled|it becomes steam
a glass falls on a stone floor|it breaks
a plant gets no water|it wilts
a seed gets water and light|it grows
iron is left in the rain|it rusts
paper touches a flame|it burns
a balloon meets a pin|it pops
bread stays too long in the oven|it turns black
milk is left out for days|it turns sour
a person skips breakfast|the person gets hungry
a person runs a long race|the person gets tired
a person stays up all night|the person feels sleepy
a person eats spoiled food|the person feels sick
a person studies hard|the person passes the test
a person hears a good joke|the person laughs
a person loses a pet|the person feels sad
a person wins a prize|the person feels proud
a person drinks cold water on a hot day|the person cools down
the sun goes down|the sky gets dark
clouds fill with water|rain falls
the wind blows hard|leaves fly away
snow covers the road|cars slip
a battery runs out|the toy stops
a light switch is turned off|the room gets dark
a kettle is heated|the water gets hot
sugar is stirred into tea|the tea gets sweet
salt is put in soup|the soup gets salty
wet clothes hang in the sun|they dry
a ball is thrown up|it falls down
a magnet is near a nail|the nail moves to it
a knife is sharpened|it cuts better
a tire loses air|it goes flat
a door is locked|nobody can come in
an alarm rings|people wake up
yeast is added to dough|the dough rises
oil is put on a hinge|it stops squeaking
butter is put in a hot pan|it melts quickly
a phone falls in water|it stops working
a fire gets no air|it goes out
wood is put on a fire|the fire grows
a pot is filled too full|it spills
a baby is hungry|the baby cries
a dog sees a stranger|the dog barks
"""

# part | whole
PARTS = """
wheel|car
pedal|bicycle
wing|airplane
engine|truck
sail|boat
handle|hammer
page|book
key|piano
string|guitar
roof|house
chimney|fireplace
branch|tree
petal|flower
root|plant
lens|camera
screen|television
keyboard|computer
sole|shoe
sleeve|shirt
collar|coat
button|jacket
finger|hand
toe|foot
knee|leg
elbow|arm
eyelid|eye
tongue|mouth
yolk|egg
crust|pie
seed|melon
trunk|elephant
mane|lion
hump|camel
fin|shark
beak|bird
hoof|horse
antenna|ant
shell|turtle
drawer|desk
mattress|bed
"""

# comparative | opposite | what the first one did because of it | what the other did
CONTRASTS = """
stronger|weaker|carried the heavy box|asked for help with the heavy box
taller|shorter|reached the top shelf|needed a stool for the top shelf
faster|slower|won the race|came in last in the race
older|younger|got a driving license first|still needed a babysitter
hungrier|less hungry|ate a second plate|left food on the plate
richer|poorer|paid for everyone|borrowed money
louder|quieter|was heard across the room|had to use a microphone
braver|more afraid|went into the dark cave|stayed outside the cave
more tired|less tired|went to bed early|stayed up to read
better at math|worse at math|helped others with fractions|needed a math tutor
more careful|less careful|broke no dishes|dropped a dish
colder|warmer|put on a sweater|took off a coat
busier|less busy|had no time to play|had time to play
thirstier|less thirsty|drank all the water|saved some water
sicker|healthier|saw the doctor|went to school as usual
happier|sadder|sang a cheerful song|cried a little
kinder|meaner|shared the candy|kept all the candy
earlier|later|got a good seat|had to stand in the back
neater|messier|had a tidy desk|could not find a pencil
better at cooking|worse at cooking|made dinner for all|burned the toast
"""

# larger thing | smaller thing | verb phrase
FITS = """
trophy|suitcase
piano|closet
sofa|elevator
bicycle|car
painting|frame
puzzle|box
turkey|oven
table|kitchen
book|pocket
doll|drawer
ball|basket
laptop|backpack
"""
