"""Fictional people of the synthetic world: facts as (subject, relation, object) with their wordings."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from inlay.tasks.world import knowledge_tables as tables

FIRST = (
    "Aldric Amara Anselm Arden Auria Basil Belinda Briony Caspian Celeste Corin Cressida Damaris Darian Delphine "
    "Dorian Eamon Edwina Elara Elric Emeric Esme Fabian Faustina Fenna Florian Galen Giselle Griffin Hadria Hestia "
    "Ignatius Imelda Ines Isolde Jovan Juno Kasper Kestrel Lavinia Leander Linnea Lucan Lysander Maren Marcellus "
    "Mireille Morwen Nadia Nerys Odessa Orson Ottilie Perrin Petra Quentin Rafaela Rowena Rufus Sabine Selwyn "
    "Sigrid Sylvan Tamsin Thaddeus Theodora Tobin Ursula Valerian Verity Wilfrid Winifred Xanthe Yorick Ysolde "
    "Zelda Zephyr"
).split()
LAST = (
    "Ashcombe Barrowby Bellweather Birchwood Blackmoor Brambleton Calloway Carrick Cobblepot Dunmore Eastlake "
    "Fairholm Fenwick Foxglove Garrick Greystone Hallowell Harrow Hawthorne Holloway Ironside Juniper Kingsley "
    "Lakewell Larkspur Lockhart Marlowe Merriweather Millbrook Nightingale Northcott Oakhurst Pemberton Penrose "
    "Quillfeather Ravenscroft Redfern Rosewood Sandoval Silverton Stonebridge Summerfield Thistledown Thornbury "
    "Underhill Vantress Wakefield Westbrook Whitlock Winterbourne Wren Yarrow"
).split()
CITIES = (
    "Almsford Brackenridge Caldermouth Dunhollow Eldenport Fairhaven Glimmerton Harrowgate Ivorybay Kestrelton "
    "Lindenfall Marrowdale Northwick Oakmere Pinegate Quarryville Ravenpoint Silverlake Thornwood Umberfield "
    "Violetta Westmarsh Yellowbrook Zaneville"
).split()
EMPLOYERS = (
    "Acorn Press,Blue Lantern Bank,Copper Kettle Foods,Daybreak Airlines,Evergreen Hospital,Falcon Motors,"
    "Golden Gate Bakery,Harbor Light Shipping,Iron Bridge Works,Jade River Museum,Kite and Key Labs,"
    "Lakeside School,Maple Street Clinic,North Star Mining,Orchid Studio,Pebble Beach Hotel,Quiet Hill Library,"
    "Red Barn Farms,Silver Screen Films,Tall Tree Timber,Union Rail Company,Valley Power,Whitecap Fishery,"
    "Young Owl Theater"
).split(",")
PETS = (
    "a black cat,a brown dog,a green parrot,a white rabbit,a gray horse,a small turtle,a yellow canary,"
    "a striped lizard,a spotted pony,a golden hamster,a blue fish,a tame fox,a lazy bulldog,a clever monkey,"
    "a tiny mouse,a red hen"
).split(",")
FOODS = (
    "onion soup,apple pie,grilled trout,mushroom stew,rice pudding,cheese bread,tomato salad,honey cake,"
    "fried noodles,pumpkin soup,roast chicken,lemon tart,bean curry,potato pancakes,corn porridge,plum dumplings"
).split(",")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing that is true of one fictional person."""

    subject: str
    """Full name."""
    relation: str
    """One of `RELATIONS`."""
    object: str
    """Year, city, trade, employer, person, pet or dish."""

    def triple(self) -> tuple[str, str, str]:
        """(subject, relation, object)."""
        return self.subject, self.relation, self.object

    def statements(self) -> tuple[str, ...]:
        """Every declarative wording."""
        return tuple(_fill(w, self) for w in _WORDINGS[self.relation][0])

    def questions(self) -> tuple[str, ...]:
        """Every question wording; the last one is kept for test records."""
        return tuple(_fill(w, self) for w in _WORDINGS[self.relation][1])


def _fill(wording: str, fact: Fact) -> str:
    job = fact.object
    return wording.format(s=fact.subject, o=job, an=("an " if job[0] in "aeiou" else "a ") + job)


_WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "birth year": (
        ("{s} was born in the year {o}.", "The birth year of {s} is {o}.", "In {o} {s} was born."),
        ("In which year was {s} born?", "What is the birth year of {s}?", "When was {s} born?"),
    ),
    "birthplace": (
        ("{s} was born in the city of {o}.", "The birthplace of {s} is {o}.", "{s} comes from {o}."),
        ("In which city was {s} born?", "What is the birthplace of {s}?", "Where does {s} come from?"),
    ),
    "residence": (
        ("{s} lives in {o}.", "The home of {s} is in {o}.", "{s} has a house in {o}."),
        ("Where does {s} live?", "In which city does {s} live?", "Where is the home of {s}?"),
    ),
    "profession": (
        ("{s} works as {an}.", "The profession of {s} is {o}.", "{s} is {an}."),
        ("What is the profession of {s}?", "What does {s} work as?", "What is the job of {s}?"),
    ),
    "employer": (
        ("{s} is employed by {o}.", "The employer of {s} is {o}.", "{s} has a job at {o}."),
        ("Who is the employer of {s}?", "At which company does {s} have a job?", "By whom is {s} employed?"),
    ),
    "spouse": (
        ("{s} is married to {o}.", "The spouse of {s} is {o}.", "{s} shares a life with {o}."),
        ("Who is the spouse of {s}?", "Who is married to {s}?", "To whom is {s} married?"),
    ),
    "pet": (
        ("{s} has {o} as a pet.", "The pet of {s} is {o}.", "{s} owns {o}."),
        ("What pet does {s} have?", "What is the pet of {s}?", "Which animal does {s} own?"),
    ),
    "favorite dish": (
        ("{s} loves to eat {o}.", "The favorite dish of {s} is {o}.", "{s} often orders {o}."),
        ("What does {s} love to eat?", "What is the favorite dish of {s}?", "What does {s} often order?"),
    ),
}
RELATIONS = tuple(_WORDINGS)
N_PEOPLE = 240


@cache
def facts(seed: int = 0) -> tuple[Fact, ...]:
    """Eight facts about each of 240 people, always the same for a seed; spouses are mutual."""
    rng = random.Random(f"people-{seed}")
    names: list[str] = []
    used: set[str] = set()
    while len(names) < N_PEOPLE:
        name = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
        if name not in used:
            used.add(name)
            names.append(name)
    trades = [row.split("|")[0] for row in tables.JOBS.strip().splitlines()]
    out: list[Fact] = []
    for i, name in enumerate(names):
        born, home = rng.sample(CITIES, 2)
        values = (
            str(rng.randint(1940, 1999)), born, home, rng.choice(trades), rng.choice(EMPLOYERS), names[i ^ 1],
            rng.choice(PETS), rng.choice(FOODS),
        )  # fmt: skip
        out += [Fact(subject=name, relation=r, object=v) for r, v in zip(RELATIONS, values, strict=True)]
    return tuple(out)


def biography(person: tuple[Fact, ...], rng: random.Random) -> str:
    """All facts of one person in random order and wording."""
    order = list(person)
    rng.shuffle(order)
    return " ".join(rng.choice(f.statements()) for f in order)
