"""How probable one letter is after another, in the Latin alphabet without accents.

Data only, counted in the words of benchmarks/routing/train.jsonl, which are of several languages.
"""

from functools import cache

EDGE = 26  # the beginning or the end of a word, beside the letters from 0 on

# A row for each letter and one for the beginning of a word; in it, a sign for each letter that may
# follow and one for the end of the word: a is 0 half bits of surprise, b is 1, and so on.
_ROWS = """
    pkjjrokpjrlhjgrkugiglmorlph gmprfturhoxgrrgsvhknitvymzj gvlrgwxgizijsufuuinhjuzwnrj
    iprmfqnsgrtmooiqwkjrkpqwnsd jokhknnqmtpjkgpmrfgjomomprf gytugisufrthssgvzhnjivwynzh
    issrfsmiiwtkqljryhkojwsznud fpsqeswsgwvnnogsvknikrrvlvg jmikimktsrnikeilrjhhqkwptpj
    eqtofppsirnrqnfnptltftqxxxj hpqperrogrolokjqzmhmkvovntf gpplfppsgvohorhpytklkosxjvg
    fkssetttgwuokphhzqkrkxtxoxg irjhhngqirnpsljrurigmotwosf mmkkonlqlrmiifjkwgjjilkppqi
    gssqfsrjizshqsgjvgkjjvsvnxi owwwsswwowqjpwwwwmwmbpsrwwi gomkfpmrgwmnllhoukijlnrxlsf
    kskrhsujiynmopkkqtjgksoyosd hsnsfrtigxumpqiqziikkvpxlrf jkkkiokqjtpiigojzgghtrtrqpj
    fstuczsufxurvthszoqupvzzpxk fprofrzigzqnsjgqzkjqpzsxpzg iphshttnhysnoymftqogpytlnse
    jomojqptlwrmkmkkzmilotovqsb gnomeusphypmnnhpupnmiqmujjf iihijjkkknljikkioigimlksppz
"""


@cache
def surprises() -> list[list[float]]:
    """The surprise in bits of every letter after every letter: `surprises()[first][second]`."""
    return [[(ord(sign) - ord("a")) / 2 for sign in row] for row in _ROWS.split()]
