"""Words that name a topic or belong to one: what lists of keywords are made of.

Data only. A prompt that uses one of them is not therefore about that topic.
"""

from functools import cache

_WORDS = {
    "code": """
        python java javascript typescript rust golang kotlin php ruby bash c++ c# html css code
        coding program programming programmer function class method loop array string variable
        compile compiler debug bug docker kubernetes regex api git github linux nginx server deploy
        terminal
        shell script algorithm recursion async import return lambda segfault stacktrace backend
        frontend react node django flask npm pip json xml yaml database sudo grep flexbox unit-test
        exception terraform systemd helm devops malloc pointer
    """,
    "data": """
        sql csv tsv excel pivot dataset spreadsheet median mean mode histogram regression outlier
        dashboard column columns row rows query table chart dataframe pandas variance correlation
        average statistics select join xlsx vlookup quartile p-value tableau analytics classify
        extract
    """,
    "creative": """
        poem poems poetry sonnet haiku story stories novel lyric lyrics ballad rhyme rhymes verse
        fairy-tale dragon slogan limerick plot character romance song screenplay ode stanza fiction
        villain hero wizard roleplay tagline
    """,
    "multilingual": """
        translate translation translator french german spanish italian japanese korean chinese
        russian arabic latin turkish polish portuguese dutch swedish greek dictionary bilingual
        vocabulary grammar
    """,
    "math": """
        integral derivative matrix matrices theorem equation equations algebra probability calculus
        eigenvalue sine cosine vector polynomial fraction geometry proof math maths lemma corollary
        logarithm trigonometry prime sum
    """,
    "logic": """
        riddle riddles syllogism premise premises paradox fallacy puzzle deduction conclusion logic
        brainteaser sudoku
    """,
}


@cache
def topic_words() -> dict[str, str]:
    """Each word with its topic."""
    return {word: topic for topic, words in _WORDS.items() for word in words.split()}
