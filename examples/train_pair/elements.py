"""Questions about the chemical elements: facts, which a model knows or does not, and which no working-out decides.

A thought about one counts up the periodic table, from the last multiple of ten before the element.
"""

import random
from itertools import product

TABLE = """
H hydrogen He helium Li lithium Be beryllium B boron C carbon N nitrogen O oxygen F fluorine Ne neon Na sodium Mg
magnesium Al aluminium Si silicon P phosphorus S sulfur Cl chlorine Ar argon K potassium Ca calcium Sc scandium Ti
titanium V vanadium Cr chromium Mn manganese Fe iron Co cobalt Ni nickel Cu copper Zn zinc Ga gallium Ge germanium
As arsenic Se selenium Br bromine Kr krypton Rb rubidium Sr strontium Y yttrium Zr zirconium Nb niobium Mo
molybdenum Tc technetium Ru ruthenium Rh rhodium Pd palladium Ag silver Cd cadmium In indium Sn tin Sb antimony Te
tellurium I iodine Xe xenon Cs caesium Ba barium La lanthanum Ce cerium Pr praseodymium Nd neodymium Pm promethium
Sm samarium Eu europium Gd gadolinium Tb terbium Dy dysprosium Ho holmium Er erbium Tm thulium Yb ytterbium Lu
lutetium Hf hafnium Ta tantalum W tungsten Re rhenium Os osmium Ir iridium Pt platinum Au gold Hg mercury Tl
thallium Pb lead Bi bismuth Po polonium At astatine Rn radon Fr francium Ra radium Ac actinium Th thorium Pa
protactinium U uranium Np neptunium Pu plutonium Am americium Cm curium Bk berkelium Cf californium Es einsteinium
Fm fermium
"""  # symbol and name of the first hundred, in order
SYMBOLS, NAMES = TABLE.split()[::2], TABLE.split()[1::2]
OF_A_LEVEL = 20  # elements, by atomic number

NUMBER_TEXTS = (
    "What is the atomic number of {}?",
    "Which atomic number does {} have?",
    "State the atomic number of {}.",
    "What number does {} have in the periodic table?",
    "Give the number of {} in the periodic table.",
    "At which place of the periodic table is {}?",
    "How many protons does an atom of {} have?",
    "How many protons are in the nucleus of {}?",
)
SYMBOL_TEXTS = (
    "What is the chemical symbol of {}?",
    "Which chemical symbol does {} have?",
    "State the chemical symbol of {}.",
    "What symbol does {} have in the periodic table?",
    "Give the symbol of {} in the periodic table.",
    "How is {} written in a chemical formula?",
    "Which letters stand for {} in the periodic table?",
    "How do chemists abbreviate {}?",
)
# What is asked by which name, in full and in few words.
KINDS = (
    (NUMBER_TEXTS, NAMES, "{}, atomic number"),
    (NUMBER_TEXTS, SYMBOLS, "{}, atomic number"),
    (SYMBOL_TEXTS, NAMES, "{}, symbol"),
)


def draw_elements(level: int, count: int, seed: int, unseen: bool) -> list[tuple[str, str, str]]:
    """Draw `count` questions of a level: text, answer, and the text in fewer words.

    `unseen` ones are worded as that question about that element never is otherwise: of its eight wordings, two.
    """
    first = OF_A_LEVEL * (level - 1)
    found = []
    for place, (kind, (texts, names, short)) in product(range(first, first + OF_A_LEVEL), enumerate(KINDS)):
        answer = SYMBOLS[place] if texts is SYMBOL_TEXTS else str(place + 1)
        found += [
            (text.format(names[place]), answer, short.format(names[place]))
            for wording, text in enumerate(texts)
            if ((place + kind + wording) % 4 == 0) == unseen
        ]
    return random.Random(seed).choices(found, k=count)


def counting_up(answer: str) -> list[tuple[str, str]]:
    """Symbol and number of the elements up to the one that an answer names; for a number, the other way round."""
    number = int(answer) if answer.isdecimal() else SYMBOLS.index(answer) + 1
    first = max((number - 1) // 10 * 10, 1)
    steps = [(SYMBOLS[place - 1], str(place)) for place in range(first, number + 1)]
    return steps if answer.isdecimal() else [(place, symbol) for symbol, place in steps]
