"""The patterns and words by which `segments` recognizes a payload and a request.

Every expression takes linear time: a repetition is bounded, or excludes what follows it.
"""

# A short line without any of these marks has no payload.
PLAIN_MARKS = ("\n", '"', "```", "~~~", "'''", "“", "„", "«", "「", "『")

FENCE = r"(?s:(```|~~~).*?\1)"
QUOTED = (
    r"'''(?s:.*?)'''|\"\"\"(?s:.*?)\"\"\"|\"(?<![\w\"]\")(?=\S)[^\"]*\"(?!\w)"
    r"|“[^“”]*”|„[^„“”]*[“”]|«[^«»]*»|「[^「」]*」|『[^『』]*』"
)

# Each line becomes one character, the name of the group that matched its start: L and C are surely
# log and code, l and c only next to another such line, n is code only next to code, q a mail quote.
LINE = (
    r"(?P<q>>(?!>>))|(?P<n>#(?!include|define|!)|//|--|/\*|\*/|\.\.\. "
    r"|(?:end|then|do|done|fi|begin|pass|break|continue);?$|(?:let|val) \w{1,40}+ ?[:=][^;]*$)"
    r"|(?P<L>Traceback \(most recent call|File \"[^\"]{1,200}\", line \d|Caused by: "
    r"|at [\w.$<>/]{1,120}\(|Exception in thread |npm ERR! "
    r"|(?:fatal|panic|error|warning)(?:\[\w+\])?: )"
    r"|(?P<l>[\[(]?(?:\d{4}[-/.]\d\d[-/.]\d\d[T ]\d\d:\d\d|\d\d:\d\d:\d\d\b)"
    r"|[A-Z][a-z]{2} [ \d]?\d \d\d:\d\d:\d\d|\d{1,3}(?:\.\d{1,3}){3} - "
    r"|\[?(?:TRACE|DEBUG|INFO|NOTICE|WARN|WARNING|ERROR|CRITICAL|FATAL)\b[\]:| \t])"
    r"|(?P<C>(?:async )?def \w{1,80}\(|class [A-Z_]\w{0,80} ?(?:[:({<]|extends |implements |$)"
    r"|(?:export |default |public |private |protected |internal |static |final |abstract |async )"
    r"{1,4}[\w<>\[\], ?]{1,80}[({=;]|(?:function\*?|func|fn|fun) ?\w{0,80} ?[(<]"
    r"|(?:struct|enum|interface|trait|impl|namespace) [\w<>: ]{1,80}\{"
    r"|#include ?[<\"]|#define \w|#!/|from [\w.]{1,80} import |import [\w.]{1,80} as \w"
    r"|import (?:[\w.*/]{1,80};?$|[\w{}*, ]{1,120} from ['\"])|using [\w.:]{1,80};|package [\w.]+;"
    r"|(?:const|var) [\w{\[][\w, :<>\]}\[]{0,60} ?="
    r"|(?:int|char|float|double|bool|boolean|void|long|string|String|auto|unsigned|size_t)[*&]? "
    r"[*&]?\w{1,60}(?:\[\w*\])? ?[=;(,]|(?:if|for|while|switch|catch|else if|elseif) ?\(.{1,200}\{$"
    r"|(?:print|printf|println!?|console\.\w{1,9}|System\.out\.\w{1,9}|fmt\.\w{1,9})\("
    r"|(?:>>>|In \[\d{1,4}\]:) \S|\$ [a-z]|</?[a-zA-Z][\w-]{0,30}(?: [^<>]{0,200})?/?>"
    r"|<!DOCTYPE|<!--|<\?\w|\\(?:documentclass|usepackage|section|begin\{document)"
    r"|SELECT .{1,200}? FROM |(?:CREATE|ALTER|DROP) (?:TABLE|VIEW|INDEX)\b|INSERT INTO "
    r"|DELETE FROM |select [\w.*, ()]{1,120} from \w{1,60}(?: where | join | group | order |;))"
    r"|(?P<c>(?:if|elif|else|try|except|finally|for|while|with)\b.{0,200}:$"
    r"|return\b[^.?!]{0,120};?$|@[\w.]{1,60}(?:\(.{0,120}\))?$|[\[\](){},;]{1,6}$"
    r"|['\"][\w -]{1,60}['\"] ?: ?\S"
    r"|(?:SELECT|FROM|WHERE|GROUP BY|ORDER BY|HAVING|VALUES|UNION|LIMIT) ?(?:[\w\"`(*]|$)"
    r"|(?:INNER |LEFT |RIGHT |FULL |CROSS |OUTER ){0,2}JOIN \w"
    r"|(?:sudo|pip3? install|npm (?:install|run)|docker (?:run|build)|kubectl \w+|git clone) \S)"
    # The rest begin with a name. A look-ahead at what follows it rules out most lines at once.
    r"|(?=[\w./-]{1,80}+ ?[-+*/|&]?[:=(\[])(?:"
    r"(?P<L2>[\w.]{0,80}(?:Error|Exception): "
    r"|[\w./-]{1,80}+:\d{1,6}(?::\d{1,6})?: (?:error|warning))"
    r"|(?P<C2>\w{1,40}+ := \S)"
    r"|(?P<c2>(?:[^\W_]{1,40}+[._][\w.]{1,40}+|\w{1,40}+\[[^\]=]{1,40}\])(?:: ?\w{1,30})? ?"
    r"[-+*/|&]?=(?!=) ?\S|\w{1,60}+(?:: ?\w{1,30})? ?=(?!=) ?(?:[\w.]{0,80}+\(|['\"\[{])"
    r"|[\w.]{2,80}+\([^()]{0,120}\);?$|[\w-]{2,30}+: ?[^;]{1,80};$)"
    r"|(?P<n2>\w{1,40}+ ?[-+*/]?= ?\S))"
)
PROSE = r"(?:[-*•] )?[A-ZÀ-Þ]?[a-zß-ÿ'’,]* [a-zß-ÿ'’,]+ [a-zß-ÿ'’,]+[ .?!:]|.*[.?!:。！？：]$"
RUN = (
    r"(?P<table>t+)|(?P<quote>q(?:q|_(?=q))*)"
    r"|(?P<log>[Ll](?:[LlCcin]|_{1,2}(?=[Ll]))*)"
    r"|(?P<code>n{0,8}[Cc](?:[Ccin]|_{1,3}(?=n{0,8}[Cci])|,{1,2}(?=[Cc]))*)"
)

# At the start of a line or a sentence. The look-ahead for a colon rules out most places at once.
LABEL = (
    r"[\n.!?。！？](?=[^\n:：]{2,40}[:：])[ \t#*_\[(<]{0,6}"
    r"(?i:(?P<body>(?:the |input |source |original )?(?:input|text"
    r"|passage|context|content|e-?mail|article|document|paragraph|excerpt|abstract|transcript|conversation|dialogue|story|essay|letter|message|review|report|background|premise"
    r"|hypothesis|sentence|tweet|post|snippet|data|texte|contexte|texto|contexto|testo|contesto"
    r"|kontext|eingabe|artikel|artículo|artigo|articolo|correo|текст|контекст|статья|письмо|النص"
    r"|文章|文本|原文|正文|内容|背景|本文|テキスト|文脈|본문|지문|내용))"
    r"|(?P<ask>(?:the |your )?(?:question|instructions?|task|answer|output|response|query|request"
    r"|options|choices|tl;dr|summary|translation|frage|aufgabe|antwort|pregunta|respuesta"
    r"|pergunta|resposta|domanda|risposta|tâche|réponse|вопрос|задание|ответ"
    r"|问题|任务|指令|回答|答案|質問|질문|답변)))(?: ?\d{1,2})?[ \t*_\])>]{0,4}[:：]"
)
OPTION = r"[(\[]?(?:[A-Ha-h]|\d{1,2}|[ivx]{1,4})[.):\]] ?\S"
INLINE_LEAD = r"[^:：.?!。！？]{1,160}(?:([:：])|[.?!。！？])(?:(?<![:.?!])|\s)\s*(?=\S)"
SENTENCE_END = r"[.!?…:]\s+|[。！？：\n]"
POINT = (
    r"[-*•·–] ?\S|\(?\d{1,2}[.)] ?\S|You (?:are|will|have|can|must|should)\b|Your "
    r"|.{0,20}(?:应该|應該|必须|必須|不要|需要)"
)
OWN_ACCOUNT = r"(?:I|I['’]\w{1,2}|My|We|Our|Ich|Mein|Je|Mon|Ma|Yo|Mi|Eu|Meu|Я|Мой)\b|我|私"
EAST_ASIAN_TEXT_WORK = (
    r"总结|總結|概括|摘要|翻译|翻譯|改写|改寫|润色|潤色|修改"
    r"|要約|翻訳|添削|校正|書き換え|요약|번역|교정"
)
EAST_ASIAN_REQUEST = (
    r"请|請|帮我|幫我|写一|寫一|ください|下さい|教えて|해\s?줘|주세요|하세요|하시오|하라"
    rf"|{EAST_ASIAN_TEXT_WORK}"
)
POINTER = (
    r"(?i)\b(?:this|these|following|below|above|attached|provided|(?:the|my|our|his|her|their) "
    r"(?:text|passage|article|paragraph|e-?mail|letter|story|essay|review|document|excerpt|report"
    r"|message|conversation|transcript)|cet?|cette|suivante?|ci-dessous|le texte|este|esta"
    r"|siguientes?|el texto|diese[rmns]?|folgenden?|unten|oben|den text|questo|seguente|il testo"
    r"|abaixo|seguinte|o texto|этот|следующ\w\w|текст|التالي|النص)\b"
    r"|以下|下面|下列|上面|上述|这段|这篇|這段|這篇|次の|下記|上記|この文|다음|위의|아래"
)
COMMENTS = r"(?m)(?:^[ \t]{0,80}(?:#(?!include|define|!)|//|--|/\*).*\n?){1,20}"
QUESTION = r"(?m)^.*[?？؟][ \t\r]*$"
QUESTION_MARKS = ("?", "？", "؟")

# Verbs of requests that work on a given text.
TEXT_VERBS = """
    summarize summarise summary tldr tl;dr translate rewrite rephrase reword paraphrase proofread
    correct edit revise polish shorten condense simplify classify categorize categorise extract
    improve critique annotate analyze analyse transcribe
    résume résumer traduis traduire traduisez reformule corrige corriger simplifie
    resume resumir resuma traduce traducir traduzca reescribe corrige corregir clasifica extrae
    zusammenfassen übersetze übersetzen korrigiere korrigieren umformulieren vereinfache kürze
    riassumi riassumere traduci tradurre riscrivi correggi semplifica
    traduza traduzir reescreva corrija simplifique classifique extraia
    переведи переведите перепиши перескажи сократи исправь обобщи ترجم لخص صحح
"""
REQUEST_VERBS = """
    write explain give tell make create generate find list show describe answer identify compare
    discuss suggest provide draft compose read determine decide evaluate respond reply complete
    continue choose select pick name calculate compute solve prove fix debug implement convert turn
    use fill sort rank count highlight outline interpret infer predict detect check review act
    pretend imagine what why how
    écris explique donne dis trouve décris réponds escribe explica da dame di encuentra describe
    responde schreibe schreib erkläre erklär gib nenne finde beschreibe beantworte fasse liste
    scrivi spiega dammi trova descrivi rispondi escreva explique dê encontre descreva
    напиши напишите объясни найди опиши ответь اكتب اشرح أجب
"""
COURTESIES = """
    please kindly can could would will you i i'd we want need like to help me us now then and also
    hi hello hey just so ok okay bitte kannst könntest können sie du mir por favor puedes podrías
    peux-tu pouvez-vous veuillez puoi per favore pode você пожалуйста можешь
"""
ALL_VERBS = TEXT_VERBS + REQUEST_VERBS
REQUIREMENTS = """
    should must please ensure avoid include don't sollte sollten muss bitte doit devrait debe
    debería deve dovrebbe deveria должен должна нужно
"""
