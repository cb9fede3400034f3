"""Words that identify a language: function words, question words, greetings, common requests.

Data only. A word that several languages share is listed under each of them; `language.py` gives
it less weight, and also accepts words written without accents.
"""

from functools import cache

_WORDS = {
    "en": """
        the of to and a in is it you that he was for on are with as i his they be at have this
        from or had by not but what some we can out other were all there when up your how an
        each she which do their if will about many then them would so these her him has more
        could no my than been who its now did down only where after most before any our me much
        should because between both under while does why into also just very over such through
        too same own again here us am having being doing during against until if write explain
        give tell make please create find list show describe translate help need want using
        english hello hi thanks thank let get know think like good new following given example
        mean one two first last every another whose whether per its don won isn doesn didn can't
    """,
    "fr": """
        le la les un une des du de et est en que qui quoi dans pour pas ne se ce cette ces sur
        avec sont au aux par plus je tu il elle nous vous ils elles mon ma mes ton ta tes son sa
        ses notre votre leur leurs mais ou où donc comme si tout tous toute très être avoir fait
        faire peux peut puis été était sera suis sommes êtes ai as avons avez ont quel quelle
        quels quelles comment pourquoi combien quand y à sans sous entre chez aussi bien même
        peu beaucoup alors encore jamais toujours écris écrire explique donne moi toi lui
        bonjour salut merci s'il voudrais aujourd hui qu c'est d'une n'est français française
        anglais deux trois quelques chaque depuis parle dis raconte traduis quels cela ça dois
        vais veux faut serait
    """,
    "es": """
        el la los las un una unos unas de del y es en que qué con por para no se su sus al lo le
        les como cómo más pero si sí ya o este esta esto estos estas ese esa eso está están son
        ser hay fue era han ha he tiene tienen muy sin sobre entre cuando cuándo donde dónde
        quien quién cual cuál cuales cuáles cuanto cuánto cuántos cuántas cuanta porque también
        hasta desde todo todos toda todas nos me te mi mis tu tus yo él ella nosotros ellos
        usted ustedes soy eres somos estoy puedo puede puedes quiero hacer hace escribe escribir
        dime dame explica explicar explícame ayúdame cuéntame ayuda necesito hola buenos buenas
        gracias favor español inglés ahora otro otra dos tres cada mejor vida día años e había
        sido uno hago tengo voy quisiera debo sería
    """,
    "de": """
        der die das den dem des ein eine einen einem einer eines und ist in im zu zum zur von
        mit auf für nicht sich auch es an als bei nach aus wie was wer wo wann warum wieso
        welche welcher welches welchen wieviel viele ich du er sie wir ihr mich dich uns euch
        mir dir ihm ihn ihnen mein meine dein deine sein seine unser kann kannst können könnte
        muss soll sollte wird werden wurde wurden war waren hat haben habe hatte sind bin bist
        nur noch aber oder wenn dass daß weil denn so dann doch schon sehr mehr über unter
        zwischen durch gegen ohne um vor bis seit kein keine keinen diese dieser dieses diesen
        man jetzt hier dort schreibe schreib erkläre erklär gib nenne mache machen bitte hallo
        guten tag danke deutsch englisch geht gibt heißt bedeutet alle alles zwei drei jeder
        jede heute morgen möchte brauche welchem würde
    """,
    "it": """
        il lo la i gli le un uno una di del dello della dei degli delle a al alla ai alle da dal
        dalla in nel nella nei nelle su sul sulla con per tra fra e è ed o ma se che chi cosa
        come quando dove perché quale quali quanto quanti quante quanta non più anche sono sei
        siamo siete era stato stata essere avere ho hai ha abbiamo hanno fare fa faccio può
        posso puoi vorrei questo questa questi queste quello quella io tu lui lei noi voi loro
        mi ti ci vi si mio mia tuo tua suo sua nostro molto poco tutto tutti ogni dopo prima
        ancora già sempre mai scrivi scrivere spiega spiegami dimmi dammi raccontami aiuto ciao
        buongiorno grazie favore italiano inglese due tre senza sotto sopra così cioè c'è qual
        adesso ora gli migliore significa voglio devo vado sarebbe
    """,
    "pt": """
        o a os as um uma uns umas de do da dos das e é em no na nos nas que com por para não se
        seu sua seus suas ao aos à às mais mas como quando onde quem qual quais quanto quantos
        quantas porque também já ou este esta isto esse essa isso está estão são ser foi era tem
        têm muito muitos sem sobre entre até desde todo todos toda todas eu você vocês ele ela
        nós eles elas meu minha meus minhas teu tua sou somos estou posso pode podes quero fazer
        faz escreva escreve escrever explique diga dê ajuda preciso olá oi bom obrigado obrigada
        favor português inglês pelo pela pelos pelas num numa lhe me te agora outro outra dois
        duas três cada melhor há havia ter sido então depois ainda só vida dia anos faço tenho
        vou quero gostaria devo consigo seria
    """,
    "nl": """
        de het een van en is in op te dat die voor met niet zijn aan er om ook als maar bij naar
        uit wat wie waar wanneer waarom hoe welke hoeveel ik jij je hij zij wij ze we mijn jouw
        kan kunt kunnen wordt worden heeft hebben heb geen nog wel dan deze dit schrijf geef hoi
        goedemorgen dank nederlands engels moet zou alstublieft over tussen
    """,
    "pl": """
        i w z na do nie się to jest że co jak dla o po od za ale czy jako przez który która
        które ja ty on ona my wy jestem są był była było będzie może mam masz kto gdzie kiedy
        dlaczego ile jaki jaka jakie napisz dzień dobry cześć dziękuję proszę bardzo tylko
    """,
    "sv": """
        och i att det som en på är av för med till den har inte om ett han hon jag du vi de var
        vad hur när varför vilken vilket kan ska skulle eller men från så min din hej tack
        mycket skriv svenska finns också
    """,
    "tr": """
        ve bir bu da de için ile ne nasıl neden kim nerede zaman kadar çok daha olarak olan
        değil mi mı ben sen biz siz onlar var yok gibi ama veya hangi kaç merhaba teşekkürler
        lütfen yaz anlamına gelmektedir nedir midir
    """,
    "vi": """
        là và của có không cho được trong một những các với này người tôi bạn như thế nào gì ai
        khi đã sẽ ở đâu tại sao bao nhiêu hãy xin chào cảm ơn về để từ đến
    """,
    "ro": """
        și de în la este că nu cu pentru o un care pe din mai sunt ce cum când unde cine să sau
        dar fost fi am ai au acest această bună salut mulțumesc scrie câte câți dintr prin
    """,
    "id": """
        yang dan di itu dengan untuk tidak ini dari dalam adalah akan pada saya anda kamu mereka
        kami apa bagaimana mengapa siapa kapan mana berapa ada bisa juga atau karena tolong halo
        terima kasih tulis buatkan sebuah
    """,
    "sw": """
        ya wa na kwa ni katika za la cha kama hii hiyo yake nini gani nani wapi lini vipi je
        mimi wewe yeye sisi wao lakini au pia sana habari asante alikuwa ana ambayo kuwa
    """,
}

STOP_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split()) for language, words in _WORDS.items()
}


@cache
def any_stop_words() -> frozenset[str]:
    """The stop words of all languages."""
    return frozenset[str]().union(*STOP_WORDS.values())


# Letters and marks that point to a language, and the languages that use them.
LETTERS: dict[str, tuple[str, ...]] = {
    "ñ": ("es",),
    "¿": ("es",),
    "¡": ("es",),
    "ã": ("pt",),
    "õ": ("pt",),
    "ç": ("fr", "pt", "tr"),
    "ß": ("de",),
    "ä": ("de", "sv"),
    "ö": ("de", "sv", "tr"),
    "ü": ("de", "tr"),
    "å": ("sv",),
    "œ": ("fr",),
    "ê": ("fr", "pt"),
    "è": ("fr", "it"),
    "ù": ("fr", "it"),
    "ì": ("it",),
    "ò": ("it",),
    "ł": ("pl",),
    "ą": ("pl",),
    "ę": ("pl",),
    "ś": ("pl",),
    "ż": ("pl",),
    "ı": ("tr",),
    "ş": ("tr",),
    "ğ": ("tr",),
    "ă": ("ro",),
    "ș": ("ro",),
    "ț": ("ro",),
    "đ": ("vi",),
    "ơ": ("vi",),
    "ư": ("vi",),
    "ạ": ("vi",),
    "ế": ("vi",),
}

# Word endings that point to a language, for questions without function words.
ENDINGS: dict[str, tuple[str, ...]] = {
    "es": ("ción", "cion", "ciones", "iendo"),
    "pt": ("ção", "ções", "cao", "coes", "agem"),
    "it": ("zione", "zioni", "mento", "ezza"),
    "de": ("keit", "heit", "schaft", "lich", "ungen"),
    "fr": ("eux", "euse", "eaux", "ements"),
}
