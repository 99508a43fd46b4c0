"""The words of the story generator.

Nouns: a trailing ``*`` marks a plural noun, ``~`` a mass noun. Adjectives are kept with the nouns they suit.
"""

from __future__ import annotations

__all__ = [
    "ACTIVITIES", "ANIMALS", "BOYS", "CRAFT_NAMES", "CREATURES", "DIGS", "EVENINGS", "FEARS", "GIRLS",
    "HELPER_ADJECTIVES", "HERO_ADJECTIVES", "HOUSES", "LAIRS", "LANDS", "NOOKS", "OUTINGS", "OUTINGS_OF_SEASON",
    "PEOPLE", "PET_NAMES", "PLACES", "REGIONS", "SEASONS", "SPOTS", "SUMMER", "THINGS", "TITLES", "WATERS",
]  # fmt: skip

GIRLS = (
    "Ada Alma Anna Bella Bree Cara Clara Daisy Dora Edith Ella Elsie Emma Fay Flora Freya Gemma Greta Hana Hazel Heidi "
    "Ida Ines Iris Jana Jill Juno Kate Kira Lena Lily Lotte Lucy Luna Mabel Maya Mia Mina Molly Nell Nina Nora Olga "
    "Olive Opal Penny Polly Rita Rosa Ruby Ruth Sara Sofia Stella Tara Tess Tilly Uma Vera Wanda Willa Yara Zara Zoe"
).split()
BOYS = (
    "Abel Adam Alfie Anton Arlo Axel Barney Basil Ben Bruno Caleb Carl Casper Colin Dario David Dylan Eddie Elias Emil "
    "Ezra Felix Finn Fred George Gil Gus Hal Hans Henry Hugo Ian Igor Ivan Jack Jakob Jonas Kai Karl Kurt Leo Levi "
    "Liam Louis Luca Marco Max Milo Ned Nico Noah Olaf Oscar Otis Otto Paul Percy Peter Pip Ralph Remy Rufus Sam Simon "
    "Sven Theo Tim Toby Tom Udo Victor Walter Yuri Zack"
).split()
TITLES = {"f": ("Grandma", "Aunt"), "m": ("Grandpa", "Uncle")}

# kind: (front limb, homes)
ANIMALS = {
    "rabbit": ("paw", "a burrow/a snug burrow"),
    "fox": ("paw", "a den/a cosy den"),
    "mouse": ("paw", "a tiny hole/a snug nest"),
    "hedgehog": ("paw", "a nest of leaves/a hollow log"),
    "squirrel": ("paw", "a hollow tree/an old oak tree"),
    "otter": ("paw", "a den of reeds/a muddy den"),
    "badger": ("paw", "a deep den/a tidy den"),
    "bear": ("paw", "a cave/a warm cave"),
    "mole": ("paw", "a tunnel/a dark tunnel"),
    "beaver": ("paw", "a lodge of sticks/a wooden lodge"),
    "raccoon": ("paw", "a hollow tree/a messy den"),
    "cat": ("paw", "a barn/a little attic"),
    "dog": ("paw", "a farm/a red kennel"),
    "frog": ("hand", "a pool/a cool pool"),
    "turtle": ("foot", "a pool/a hole in a mossy bank"),
    "owl": ("wing", "an old tower/a hollow tree"),
    "sparrow": ("wing", "a nest/a round nest"),
    "duck": ("wing", "a nest of reeds/a soft nest"),
    "goose": ("wing", "a farm/a shed"),
    "crow": ("wing", "a tall pine tree/a big nest"),
    "goat": ("hoof", "a stable/a stone hut"),
    "pony": ("hoof", "a stable/a green paddock"),
    "deer": ("hoof", "a quiet glade/a thicket"),
    "donkey": ("hoof", "a stable/an old shed"),
    "sheep": ("hoof", "a pen/a stone hut"),
    "pig": ("hoof", "a sty/a tidy sty"),
    "hare": ("paw", "a grassy hollow/a snug hollow"),
}
HOUSES = (
    "a small house/a white house/a wooden cabin/a stone cottage/a tall narrow house/a cottage with a green door/"
    "a farmhouse/a house with a round window/a blue house/a house with a tall chimney/a house full of clocks"
).split("/")
PEOPLE = (
    (
        "baker farmer fisher shepherd miller carpenter gardener potter weaver sailor blacksmith tailor teacher doctor "
        "baker "
        "beekeeper painter shoemaker clockmaker librarian mail carrier woodcutter innkeeper"
    )
    .replace("mail carrier", "mail_carrier")
    .split()
)
HERO_ADJECTIVES = (
    "little young small curious brave shy cheerful clever gentle quiet lively stubborn dreamy careful merry kind eager "
    "honest thoughtful playful friendly patient proud lazy"
).split()
HELPER_ADJECTIVES = (
    "old wise kind tall grey friendly plump tired busy sleepy gentle cheerful patient clever jolly quiet strong slow "
    "polite funny"
).split()
CREATURES = (
    "kitten duckling lamb puppy chick fawn foal calf sparrow hedgehog mouse rabbit squirrel turtle frog owl robin "
    "swallow piglet goat"
).split()

REGIONS = (
    "at the edge of the forest/beside a quiet lake/near the sea/at the foot of a hill/on the far side of the valley/"
    "at the end of a winding lane/in the middle of a wide meadow/not far from the river/where two roads met/"
    "behind the apple orchard/high up in the mountains/on a small green island/close to the old stone bridge/"
    "in a village by the sea/between the mill and the pond/under three tall poplars"
).split("/")
PLACES = (
    "forest:in/meadow:in/river:by/lake:by/hill:on/market:at/mill:at/orchard:in/pond:by/beach:on/harbor:at/well:by/"
    "old tower:in/castle:at/village square:in/library:in/bakery:at/stream:by/field:in/vineyard:in/chapel:behind/"
    "quarry:in/marsh:in/cliff:below/pine wood:in/waterfall:by/ferry:by/windmill:beside/park:in/schoolyard:in"
).split("/")
SPOTS = (
    "under the old bridge/behind the barn/inside a hollow log/between the roots of an oak/in the tall grass/"
    "behind a stack of firewood/under a rose bush/on top of the garden wall/at the bottom of a ditch/"
    "in a bird's nest/under a pile of leaves/beside the garden gate/behind the stone wall/in an empty barrel/"
    "under a cabbage leaf/among the reeds/next to the well/on a low branch/in the corner of the shed/under the stairs/"
    "behind the haystack/in a patch of clover/under an upturned boat/in the mouth of a cave/beside the mill wheel/"
    "between two flat stones/under the kitchen table/on the window sill/in the hayloft/behind a curtain of ivy"
).split("/")
ACTIVITIES = (
    "climb trees/pick berries/skip stones/fly kites/read old books/sing songs/collect shells/watch the clouds/"
    "bake bread/paint pictures/tell stories/swim in the river/dig for worms/chase butterflies/count the stars/"
    "build towers of stones/play hide and seek/ride on the hay cart/listen to the birds/gather nuts/draw maps/"
    "make paper boats/feed the ducks/whistle tunes/roll down hills/look for mushrooms/jump in puddles/plant flowers/"
    "carve small figures/sail toy boats/write letters/dance in the rain/sleep in the sun/solve riddles/catch tadpoles/"
    "polish pebbles/weave baskets/race the wind/swing on the gate/press leaves in a book"
).split("/")

# category: groups of (adjectives, nouns)
THINGS = {
    "metal": (
        ("silver golden copper shiny tiny old brass round",
         "ring key coin bell whistle locket brooch compass thimble spoon medal watch star lamp"),
    ),
    "cloth": (
        ("red blue green yellow purple woolen striped soft warm orange white",
         "scarf hat cap mittens* gloves* ribbon blanket socks* shawl coat slippers* apron"),
    ),
    "toy": (
        ("red blue painted wooden little yellow green new striped",
         "kite ball doll top puppet boat drum wagon hoop horse marbles* blocks* train yo-yo"),
    ),
    "tool": (
        ("long strong heavy rusty sturdy old big", "rope ladder shovel bucket basket net broom rake pole plank hook"),
    ),
    "instrument": (
        ("old wooden small dusty golden fine", "flute drum fiddle harp trumpet horn guitar accordion banjo bagpipe"),
    ),
    "crop": (
        ("sweet fat fine bright tall juicy crisp",
         "carrots* beans* pumpkins* sunflowers* tomatoes* strawberries* peas* turnips* tulips* potatoes* melons* "
         "cabbages* onions* radishes* roses* leeks*"),
    ),
    "meal": (
        ("warm fresh sweet", "bread~ porridge~ pie cake cookies* pancakes* buns* muffins* biscuits* tart"),
        ("hot thick creamy spicy", "soup~ stew~ broth~ cocoa~ tea~"),
    ),
    "snack": (
        ("ripe sweet juicy red", "apple pear plum peach cherries* berries* grapes*"),
        ("fresh crunchy tasty small", "bun cookie nuts* raisins* cheese~ oatcakes* honeycomb"),
    ),
    "sweets": (
        ("sweet warm crunchy fresh", "cookies* pancakes* buns* nuts* biscuits* muffins* gingerbread~ waffles*"),
    ),
    "store": (("dried red sweet good", "apples* pears* nuts* potatoes* carrots* beans* plums* pumpkins*"),),
    "baking": (
        ("big round tall wonderful famous", "apple_pie cake honey_cake berry_tart plum_cake nut_cake gingerbread~"),
    ),
    "ingredient": (
        ("fresh fine good sweet", "flour~ honey~ butter~ eggs* sugar~ milk~ cream~ nuts* cinnamon~ jam~ raisins*"),
    ),
    "craft": (
        ("fine strong clever splendid", "raft boat cart sled treehouse swing kite windmill bridge hut birdhouse"),
    ),
    "patch": (
        ("dry strong thick good", "planks* nails* canvas~ glue~ wax~ wire~ string~ leather~ rope~ cloth~ bark~"),
    ),
    "treasure": (
        (
            "old faded dusty strange",
            "letters* songbook storybook seeds* puppets* paints* pictures* chessboard telescope",
        ),
    ),
    "fragile": (
        ("blue painted fine white old", "teapot vase plate jug mirror lamp bowl teacup clock window_box candlestick"),
    ),
    "rainwear": (("warm long green yellow thick old red", "coat cape hat shawl cloak boots* raincoat"),),
    "light": (("small bright old little brass", "lantern candle lamp torch"),),
    "glass": (("big clear round empty", "jar bottle bowl glass"),),
    "magic": (("old golden strange shiny tiny silver", "ring lamp coin bell stone key shell feather bottle"),),
    "guard": (("tall big funny good", "scarecrow fence net rattle"),),
    "goods": (("new good big sturdy", "broom hammer kettle cushion brush saw blanket basket clock pan"),),
    "present": (
        ("pretty lovely little fine", "necklace bracelet picture card scarf box lantern crown music_box nutcracker"),
    ),
}  # fmt: skip

# season: (adjectives for a day, what one sees, months)
SEASONS = {
    "spring": ("mild bright windy rainy fresh sunny", (
        "the apple trees were in bloom", "the first swallows had come back", "the brooks were full of melted snow",
        "yellow flowers covered the meadows", "the lambs were learning to jump",
    ), "March April May"),
    "summer": ("hot sunny golden still dusty warm", (
        "the wheat stood high and yellow", "the bees hummed in the clover", "the strawberries were ripe",
        "the evenings were long and warm", "the stream was so low that one could walk across",
    ), "June July August"),
    "autumn": ("foggy windy grey golden cool rainy", (
        "the leaves were turning red", "the apples were falling from the trees", "geese were flying south",
        "mist lay over the fields", "the nuts were ripe in the hedges",
    ), "September October November"),
    "winter": ("cold frosty snowy clear icy white", (
        "snow lay on the roofs", "the pond was frozen", "icicles hung from the gutters",
        "smoke rose from every chimney", "the nights were long and full of stars",
    ), "December January February"),
}  # fmt: skip
LANDS = (
    "forest:in/meadow:in/river:by/lake:by/hill:on/marsh:in/pine wood:in/stream:by/heath:on/cliff:below/field:in".split(
        "/"
    )
)
OUTINGS = "watch the clouds/collect stones/paint pictures/look for feathers/play hide and seek".split("/")
OUTINGS_OF_SEASON = {
    "spring": "pick flowers/listen to the birds/chase butterflies/catch beetles".split("/"),
    "summer": "pick berries/chase butterflies/pick flowers/catch beetles".split("/"),
    "autumn": "gather nuts/look for mushrooms/fly kites/gather acorns".split("/"),
    "winter": "look for tracks/build a snowman/slide down the slope/feed the birds".split("/"),
}
LAIRS = (
    "behind the barn/inside a hollow log/in the tall grass/behind a stack of firewood/under a pile of leaves/"
    "behind the stone wall/in an empty barrel/among the reeds/behind the haystack/under an upturned boat/"
    "in the hayloft/"
    "in the mouth of a cave/under the stairs/in the corner of the shed"
).split("/")
NOOKS = (
    "behind a great rock/under a fallen beam/at the bottom of some steps/in a dark corner/beside a heap of stones/"
    "at the edge of a pit"
).split("/")
DIGS = (
    "under the old oak/between two flat stones/beside the mill wheel/behind the stone wall/at the foot of a cliff/"
    "beneath a rose bush/behind the barn/next to an empty well/below a crooked pine"
).split("/")
EVENINGS = (
    "tell stories/sing songs/play cards/solve riddles/tell jokes/read old books/listen to the fire/count the stars/"
    "play checkers/look at old pictures"
).split("/")
FEARS = "dark forest/old tower/black cave/old mine/empty castle/great swamp/ruined mill/deep gorge".split("/")
WATERS = "lake/pond/river/canal".split("/")
SUMMER = "summer came/the days grew long/the cuckoo called/July came/the wheat turned yellow".split("/")
PET_NAMES = "Button Pepper Whiskers Patch Biscuit Acorn Pebble Clover Cricket Cinnamon Bramble Thimble".split()
CRAFT_NAMES = "Swallow/Lightning/Old Faithful/Thunder/Morning Star/Bumblebee/Silver Arrow/Seven Winds".split("/")
