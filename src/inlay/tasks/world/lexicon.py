"""Word lists of the synthetic world: people, things, places and times of everyday school problems."""

from __future__ import annotations

GIRLS = (
    "Alice Alyssa Amanda Amy Andrea Angela Anna Annie Ashley Bella Beth Betty Bianca Brenda Carla Carol Chloe Cindy "
    "Clara Connie Daisy Dana Debby Diana Edna Ella Ellen Emily Emma Erin Eva Faye Fiona Gina Gloria Grace Gwen Haley "
    "Hannah Heather Helen Irene Isabel Ivy Jane Janet Jasmine Jenny Jessica Joan Josie Joy Julia Kaleigh Karen Kate "
    "Katie Kelly Kim Kimberly Laura Lana Lena Lily Linda Lisa Lola Lucy Maggie Maria Marie Marcia Martha Mary Maya "
    "Megan Melanie Melissa Mia Molly Nancy Natalie Nina Nora Norma Olivia Paige Pamela Paula Rachel Rebecca Robin "
    "Roberta Rosa Rose Ruth Sally Sandy Sara Sarah Sharon Sheila Shelly Sofia Sophie Stella Sue Susan Tammy Tanya "
    "Teresa Tiffany Tina Valerie Vanessa Vera Victoria Violet Wendy Zoe"
).split()
BOYS = (
    "Aaron Adam Alan Albert Alex Allan Andrew Arthur Ben Benny Bill Billy Bob Bobby Brad Brandon Brian Bryan Carl "
    "Carlos Charles Charlie Chris Colin Craig Dan Daniel Darren Dave David Dean Dennis Derek Don Doug Dylan Ed Edward "
    "Eric Ethan Evan Felix Frank Fred Gary George Glen Greg Harry Henry Hugo Ian Isaac Jack Jacob Jake James Jared "
    "Jason Jeff Jeremy Jerry Jim Joe John Jonah Jordan Jose Josh Juan Kaleb Keith Ken Kenny Kevin Kurt Kyle Larry Lee "
    "Leo Lewis Liam Logan Louis Luis Luke Mark Martin Marvin Matt Max Michael Mike Nathan Ned Neil Nick Noah Oliver "
    "Oscar Owen Patrick Paul Pedro Peter Phil Ralph Ray Ricky Robert Roger Ron Roy Ryan Sam Scott Sean Shawn Simon "
    "Stan Steve Steven Ted Thomas Tim Todd Tom Tommy Tony Trevor Tyler Victor Vince Walter Warren Wayne Will Zach"
).split()

OBJECTS: dict[str, list[str]] = {
    "fruit": (
        "apple apples,orange oranges,pear pears,peach peaches,plum plums,lemon lemons,lime limes,banana bananas,"
        "watermelon watermelons,pumpkin pumpkins,strawberry strawberries,cherry cherries,melon melons,fig figs,"
        "cantaloupe cantaloupes,berry berries,grape grapes,mango mangoes,apricot apricots"
    ).split(","),
    "vegetable": (
        "carrot carrots,turnip turnips,onion onions,potato potatoes,tomato tomatoes,cucumber cucumbers,bean beans,"
        "pepper peppers,radish radishes,cabbage cabbages,beet beets,squash squashes"
    ).split(","),
    "sweet": (
        "cookie cookies,cupcake cupcakes,cake cakes,pie pies,muffin muffins,brownie brownies,candy candies,"
        "lollipop lollipops,donut donuts,pastry pastries,cracker crackers,pretzel pretzels,waffle waffles,"
        "chocolate chocolates,gumball gumballs,pancake pancakes,biscuit biscuits,tart tarts"
    ).split(","),
    "toy": (
        "marble marbles,sticker stickers,toy toys,balloon balloons,block blocks,card cards,doll dolls,puzzle puzzles,"
        "baseball baseballs,ball balls,toy_car toy cars,baseball_card baseball cards,action_figure action figures,"
        "video_game video games,stuffed_animal stuffed animals,kite kites,whistle whistles,trading_card trading cards,"
        "bead beads,game games,robot robots,bottle_cap bottle caps,football_card football cards"
    ).split(","),
    "school": (
        "pencil pencils,crayon crayons,pen pens,eraser erasers,marker markers,notebook notebooks,ruler rulers,"
        "folder folders,paper_clip paper clips,binder binders,worksheet worksheets,scissor scissors,paintbrush "
        "paintbrushes,coloring_book coloring books,index_card index cards,sheet sheets,glue_stick glue sticks"
    ).split(","),
    "media": (
        "book books,magazine magazines,comic_book comic books,movie movies,song songs,picture pictures,photo photos,"
        "stamp stamps,postcard postcards,letter letters,newspaper newspapers,poster posters,album albums"
    ).split(","),
    "coin": "dime dimes,quarter quarters,penny pennies,nickel nickels,coin coins,dollar dollars".split(","),
    "flower": (
        "rose roses,tulip tulips,daisy daisies,orchid orchids,flower flowers,lily lilies,sunflower sunflowers,"
        "violet violets,daffodil daffodils,carnation carnations"
    ).split(","),
    "tree": (
        "oak_tree oak trees,maple_tree maple trees,walnut_tree walnut trees,pine_tree pine trees,orchid_bush orchid "
        "bushes,rose_bush rose bushes,dogwood_tree dogwood trees,poplar_tree poplar trees,crepe_myrtle crepe myrtles,"
        "willow_tree willow trees"
    ).split(","),
    "nature": (
        "seashell seashells,shell shells,stone stones,rock rocks,leaf leaves,acorn acorns,pine_cone pine cones,"
        "feather feathers,starfish starfish,pebble pebbles,stick sticks,egg eggs,worm worms,bug bugs,nut nuts"
    ).split(","),
    "animal": (
        "dog dogs,cat cats,kitten kittens,puppy puppies,bird birds,fish fish,rabbit rabbits,goldfish goldfish,"
        "chicken chickens,duck ducks,horse horses,cow cows,sheep sheep,goat goats,pig pigs,turtle turtles,"
        "hamster hamsters,bee bees,parrot parrots,frog frogs,squirrel squirrels,mouse mice"
    ).split(","),
    "clothes": (
        "shirt shirts,sweater sweaters,dress dresses,hat hats,sock socks,skirt skirts,scarf scarves,jacket jackets,"
        "towel towels,shoe shoes,tie ties,glove gloves,short_sleeve_shirt short sleeve shirts,blouse blouses"
    ).split(","),
    "food": (
        "sandwich sandwiches,pizza pizzas,hot_dog hot dogs,hamburger hamburgers,bottle bottles,can cans,"
        "slice_of_pizza slices of pizza,taco tacos,box_of_cereal boxes of cereal,bag_of_chips bags of chips,"
        "juice_box juice boxes,peanut peanuts,cup_of_juice cups of juice,loaf loaves,pepper_shaker pepper shakers"
    ).split(","),
    "people": (
        "student students,teacher teachers,child children,player players,friend friends,customer customers,"
        "worker workers,boy boys,girl girls,guest guests,visitor visitors,passenger passengers,fan fans,kid kids,"
        "teenager teenagers,adult adults,employee employees"
    ).split(","),
}

SHOPS = {
    "fruit": "market,grocery store,farm,fruit stand,supermarket",
    "vegetable": "market,grocery store,farm,supermarket",
    "sweet": "bakery,candy store,school fair,store,bake sale",
    "toy": "toy store,mall,yard sale,flea market,store,fair",
    "school": "store,school store,mall,supermarket",
    "media": "book store,yard sale,book fair,library sale,store",
    "coin": "bank",
    "flower": "flower shop,market,garden center",
    "tree": "garden center",
    "nature": "market,store",
    "animal": "pet store,farm,animal shelter",
    "clothes": "mall,store,clothing store,department store",
    "food": "cafe,grocery store,restaurant,supermarket",
    "people": "school,park",
}
PLACES = {
    "fruit": "orchard,garden,farm,field,tree",
    "vegetable": "garden,farm,field",
    "sweet": "kitchen,bakery,party",
    "toy": "attic,basement,park,playground,closet",
    "school": "drawer,desk,classroom,school",
    "media": "library,attic,living room",
    "coin": "park,street,sofa,sidewalk",
    "flower": "garden,park,field,flower bed",
    "tree": "park,forest,garden,yard",
    "nature": "beach,park,forest,yard,river",
    "animal": "farm,park,barn,yard,zoo,pond",
    "clothes": "closet,laundry room,bedroom",
    "food": "kitchen,cafeteria,picnic",
    "people": "park,school,playground,museum,pool",
}
HOLDERS = {
    "fruit": "basket,bag,bowl,crate,box",
    "vegetable": "basket,bag,crate,box",
    "sweet": "jar,box,bag,tray,plate",
    "toy": "box,bag,bin,shelf,case",
    "school": "drawer,box,desk,cup,pack",
    "media": "shelf,box,album,drawer,stack",
    "coin": "bank,jar,purse,pile,bag",
    "flower": "vase,bouquet,pot,bunch",
    "tree": "row,park",
    "nature": "bucket,bag,jar,box,pile",
    "animal": "cage,pen,tank,barn,yard",
    "clothes": "drawer,box,suitcase,closet,basket",
    "food": "cooler,box,bag,carton",
    "people": "bus,room,van,team,group",
}
COLORS = "red blue green yellow black white purple pink orange brown".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
TIMES = (
    "yesterday,today,last week,this week,last month,this month,in the morning,in the afternoon,on Saturday,"
    "on Sunday,over the weekend,during the summer,at recess,after school,before lunch"
).split(",")
RELATIVES = "mom dad sister brother mother father uncle aunt friend grandmother grandfather teacher neighbor".split()
CHORES = (
    "mowing lawns,washing cars,walking dogs,selling lemonade,babysitting,raking leaves,delivering newspapers,"
    "doing chores,shoveling snow,watering plants,painting fences,cleaning windows"
).split(",")
LENGTHS = "inches,feet,miles,kilometers,meters,yards,centimeters,blocks,laps".split(",")
WEIGHTS = "pounds,grams,ounces,tons,kilograms".split(",")
LIQUIDS = "water,milk,juice,oil,gas,paint,lemonade,soda,honey,soup".split(",")
VOLUMES = "cups,gallons,liters,quarts,buckets,bottles".split(",")
THINGS_MEASURED = "rope,ribbon,board,string,wire,stick,pipe,branch,fence,line,table,scarf,worm,plant".split(",")
INGREDIENTS = "flour,sugar,butter,rice,salt,nuts,raisins,oats,cheese,milk".split(",")
PRICED = (
    "shirt,book,toy,football,baseball,hat,jacket,pizza,sandwich,soda,ticket,magazine,game,kite,puzzle,lamp,"
    "backpack,pair of shoes,video game,burger,salad,ice cream,notebook,coloring book,skateboard,hot dog"
).split(",")
