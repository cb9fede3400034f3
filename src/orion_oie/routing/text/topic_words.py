"""Words that name a topic or belong to one: what lists of keywords are made of.

Data only. A prompt that uses one of them is not therefore about that topic.
"""

from functools import cache

_WORDS = {
    "code": """
        python java javascript typescript rust kotlin php ruby bash c++ c# html css code
        coding program programming programmer function class method loop array string variable
        compile compiler debug bug docker kubernetes regex api git github linux nginx server deploy
        terminal
        shell script algorithm recursion async import return lambda segfault stacktrace backend
        frontend react node django flask npm pip json xml yaml database sudo grep flexbox unit-test
        exception terraform systemd helm devops malloc pointer golang stack-trace swift scala perl
        código programm питон код
        numpy tensorflow pytorch keras scikit-learn kubectl webpack vue angular svelte
        laravel spring spring-boot maven gradle compiling debugging debugger refactor
        refactoring boolean integer struct interface pointers stack heap queue linked-list
        hashmap hash loops arrays functions classes methods variables strings exceptions
        callback promise closure decorator endpoint rest graphql websocket oauth jwt ssh
        http https tcp dns chmod cron crontab makefile cmake gcc clang vim emacs vscode ide
        repository commit merge rebase branch pull-request ci cd jenkins ansible aws azure
        linter pytest unittest selenium regexp scripting powershell haskell lua elixir
        erlang cobol fortran assembly opcode bytecode kernel software app bugfix codes
        selector div padding hover bootstrap tailwind sass jquery nodejs express redis
        mongodb recursive sorting
    """,
    "data": """
        sql csv tsv excel pivot dataset spreadsheet median mean mode histogram regression outlier
        dashboard column columns row rows query table chart dataframe pandas variance correlation
        average statistics select join xlsx vlookup quartile p-value tableau analytics classify
        extract
        csvs datasets spreadsheets sqlite mysql postgres postgresql bigquery pivot-table
        pivots queries group-by joins inner-join where having tables charts graph graphs
        histogramm scatterplot boxplot dashboards powerbi etl warehouse metrics kpi
        percentile standard-deviation deviation anova t-test chi-square bayesian clustering
        k-means classification classifier forecast regression-analysis sample-size
        confidence-interval analysis
    """,
    "creative": """
        poem poems poetry sonnet haiku story stories novel lyric lyrics ballad rhyme rhymes verse
        fairy-tale dragon slogan limerick plot character romance song screenplay ode stanza fiction
        villain hero wizard roleplay tagline lullaby princess sword poema poème gedicht
        märchen cuento стихи роман сказка
        metaphor simile protagonist antagonist dialogue monologue fanfic fanfiction fable
        fables legend epic saga short-story novella villanelle couplet acrostic ghazal
        storytelling narrator worldbuilding elf elves goblin unicorn mermaid vampire pirate
        knight castle quest screenwriting playwright theatre drama comedy tragedy satire
        parody jingle copywriting ad-copy moonlight roses songwriting chorus rap free-verse
        fantasy sci-fi thriller prose caption
    """,
    "multilingual": """
        translate translation translator french german spanish italian japanese korean chinese
        russian arabic latin turkish polish portuguese dutch swedish greek dictionary bilingual
        vocabulary grammar czech danish norwegian finnish hungarian thai hindi hebrew subtitles
        übersetzung übersetzen traducción traduction traduzione перевод
        mandarin cantonese urdu bengali tamil telugu swahili welsh irish icelandic ukrainian
        serbian croatian bulgarian romanian slovak indonesian malay vietnamese filipino
        tagalog catalan basque persian farsi traduire traducir tradurre traduci traduce
        traduzir übersetze interpreter subtitle localization localisation conjugation
        conjugate declension pronunciation loanword idiom idioms transliteration
    """,
    "math": """
        integral derivative matrix matrices theorem equation equations algebra probability calculus
        eigenvalue sine cosine vector polynomial fraction geometry proof math maths lemma corollary
        logarithm trigonometry prime sum ecuación gleichung matemáticas интеграл
        integrals derivatives differential tensor gradient asymptote logarithms exponent
        factorial permutation combinatorics fractions decimals trigonometric tangent
        hypotenuse pythagoras fourier laplace eigenvector eigenvectors determinant modulo
        arithmetic quadratic parabola binomial topology euler primes theorems proofs
        integration differentiation sinus kosinus integralrechnung
    """,
    "logic": """
        riddle riddles syllogism premise premises paradox fallacy puzzle deduction conclusion logic
        brainteaser sudoku argument rätsel acertijo загадка
        syllogisms paradoxes fallacies puzzles deductions deductive inductive modus-ponens
        ponens tollens contradiction tautology knights-and-knaves brain-teaser enigma
        inference quantifier entailment truth-table ad-hominem strawman nonogram
    """,
    "conversation": """
        recipe recipes holiday holidays wedding horoscope travel football birthday weather medicine
        garden rezept receta recette рецепт
        cooking gardening yoga fitness diet astrology celebrity gossip vacation hotel
        flights baking pets skincare
    """,
}


@cache
def topic_words() -> dict[str, str]:
    """Each word with its topic."""
    return {word: topic for topic, words in _WORDS.items() for word in words.split()}
