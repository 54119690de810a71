"""Frequent words and the letters of the languages that share a script.

Most are function words, which no text of some length can avoid. For Danish and Norwegian, which share most of those,
there are also everyday words that are spelled differently.
"""

from __future__ import annotations

LATIN_WORDS = {
    "cs": """
        že jsem jsou jste jsme byl byla bylo byly být není nebo který která které kteří když jako ještě také jen ale
        aby by při před přes pro pod nad bez po ze ve na se si to ten ta tento tato toto jeho její jejich já ty on ona
        oni my vy co kde kdy proč jak více velmi už až tak však i a do od s z v o u k ke má mají může můžete mohou
        musí svůj svou své první dva tři prosím děkuji každý každé každou což protože pokud podle mezi
    """,
    "da": """
        af ikke jeg mig dig sig nogle noget nogen meget hvad hvem hvordan hvorfor efter mellem gennem kun lidt blev
        bliver blive været være også både selv op ud frem hjem når eller og er en et den det de der som på til med for
        fra om at han hun vi du har havde kan skal vil skulle ville kunne hans hendes deres min din sin vores jer men
        hvis så da nu her end under over uden ved alle mange dag ham hende os dem giv hver hvert hvor finder fortæl
        fortæller giver gør siger sige tager lægger bygger bruger brug laver lave gik fik sagde gav tog stod fandt
        arbejde arbejder mad gade bog bøger uge uger penge dreng pige kvinde mand børn hjælp hjælpe vej vejen vejr
        himlen vand køb købe åben åbner åbent sprog kage kød hvid grøn høj højt smuk nyt forskellige vigtigt altid
        aldrig igen måske næste sidste gange sådan inden udenfor indenfor hertil lyset lille mulighed muligheder
        frihed sikkerhed sundhed rettigheder rettighed ret hvorved arbejdet ligesom brugt lavet sker skete ske bør
        bliv virkelig dejlig dejligt selvom fordi tit hvornår kigger sørg prøv vælg læg tænk snak mindst dit hinanden
        hvilken hvilket hvilke mennesket eget viser vise begynder begynd lad bed bede beder tak
    """,
    "de": """
        der die das den dem des ein eine einen einem einer eines und oder aber nicht ist sind war waren sein wird
        werden wurde hat haben hatte kann können soll sollte muss müssen ich du er sie es wir ihr sich mich dir mir
        uns ihm ihn ihnen ihre ihren mit von zu zum zur im in an am auf für aus bei beim nach über unter vor durch um
        ohne als wie wenn weil dass auch nur noch schon sehr so dann man was wer wo warum jede jeden jeder viel mehr
        kein keine mein meine bitte gibt
    """,
    "en": """
        the of and to a in is that it for was on are as with his they at be this have from or had by but not what all
        were we when your can said there an each which she do how their if will up about out many then them these so
        some her would make him into has two more no could my than been who its now down did get may you i he me us
        our because while where why should very just only also any such please need today tomorrow am go know like
        want here after before most over well yes both every is're don it's
    """,
    "es": """
        el los las del y un una unos unas que en por para con se su sus lo le les es son fue era ser está están estar
        hay al más pero como muy también cuando donde qué quién cómo porque si ya sin sobre entre hasta desde este
        esta estos estas ese esa eso esto yo tú él ella ellos usted ustedes nos nosotros mi mis tu tus te me no ni o u
        de la a cada todo todos todas otro otra tiene tienen puede pueden hacer durante mientras aunque cuál según
        después antes así
    """,
    "fi": """
        ja on ei se että hän ne he minä sinä me te joka jotka jonka jossa mutta kun niin kuin myös ovat oli olivat ole
        olla olen olet eivät en et emme tai vai sekä jos koska vaikka vain jo vielä nyt sitten tämä tämän nämä tässä
        siitä sen sitä niitä hänen minun sinun mikä mitä miten miksi missä voi voivat voit pitää täytyy kanssa ennen
        jälkeen aikana ilman kaikki jokainen jokaisella hyvin enemmän kuten mukaan itse eli joten lisäksi esimerkiksi
        usein aina tulee täältä sinne tänne siellä täällä näin paljon vähän hieman kerran päivä päivän aikaa aika hyvä
        uusi uuden muista varmista älä ensin lopuksi seuraavaksi yksi kaksi kolme joskus heti kautta ympäri vasten
        luona päälle alla yli ali pitkin takana edessä vieressä välillä sisällä kotiin kotona tuli sanoi meni otti
        antoi hei terveisin kiitos vanha pieni iso suuri kuka koko
    """,
    "fr": """
        le les des du et un une est sont était être avec pour dans sur par pas ne ce cette ces cet qui que quoi dont
        où il elle ils elles je tu nous vous on se sa son ses leur leurs mon ma mes ton ta tes votre vos notre nos au
        aux plus mais ou donc car si comme quand même aussi très tout tous toute toutes sans sous entre chez peut
        peuvent faire fait ont avait avoir été après avant chaque à la de en lui y alors ainsi pendant d l n s j qu c
        combien font fais voici voilà lorsque puis parce dit doit doivent peux veux cela ça ceux celle
    """,
    "hu": """
        az egy és hogy nem is meg csak van volt vannak lesz lehet kell mint vagy ha de mert amely amelyek aki akik ami
        amit ez ezt ezek azt azok azért ezért nagyon már még el ki be le fel ők én te mi ti ő őt mindenki minden minek
        mit miért hogyan hol amikor után előtt alatt között szerint által nélkül során illetve pedig így úgy akkor ott
        itt több sem se saját kérlek valamint fog tud a s
    """,
    "it": """
        il lo gli le un una uno di del della dello dei delle degli da dal dalla nel nella nei nelle al alla ai alle
        sul sulla con per tra fra e è sono era essere ha hanno aveva che chi cui non come anche più ma se si ci ne mi
        ti vi lui lei loro noi voi io tu questo questa questi queste quello quella suo sua suoi sue mio mia quando
        dove perché cosa ogni tutto tutti tutte molto poi già così può possono deve fare ancora dopo prima senza ed
        oppure a la i o in l d fino sera resta solo quindi invece qualcosa qualcuno volta chiunque quanto quale quali
        sto stai fa
    """,
    "nl": """
        de het een en van is dat die niet ook aan met voor zijn was waren wordt worden werd door naar om bij uit op te
        als maar er nog wel dan zij hij wij ze je jij jou jouw u uw ik mij me mijn ons onze hun haar heeft hebben had
        kan kunnen moet moeten zal zou wil dit deze tot over onder tussen tegen zonder of omdat wanneer waar wat wie
        hoe waarom al veel meer geen zich in toe daar hier heel elk elke iedereen zodat terwijl eens s
    """,
    "no": """
        av ikke jeg meg deg seg noen noe mye hva hvem hvordan hvorfor etter mellom gjennom bare litt ble blir bli vært
        være også både selv opp ut fram frem hjem når eller og er en et ei den det de der som på til med for fra om at
        å han hun vi du dere har hadde kan skal vil skulle ville kunne hans hennes deres min din sin vår våre men hvis
        så da nå her enn under over uten ved alle mange dag ham henne oss dem gi hver hvert hvor mot finner fortell
        forteller gir gjør sier si tar legger bygger bruker bruk lager lage vet gikk fikk sa ga tok sto fant arbeid
        jobber mat gate bok bøker uke uker penger gutt jente kvinne mann hjelp hjelpe vei veien vær himmelen vann kjøp
        kjøpe åpen åpner åpent språk kake kjøtt hvit grønn høy høyt vakker nytt forskjellige viktig alltid aldri igjen
        kanskje neste siste ganger slik innen utenfor innenfor hit dit lyset trenger lite liten mulighet muligheter
        frihet sikkerhet helse rettigheter rettighet rett arbeidet likesom skjer skjedde virkelig deilig fordi sein ta
        sørg prøv velg legg tenk snakk minst dessuten slikt steke gjerne vennlig bør hvilken hvilket hvilke mennesket
        eget viser vise begynner begynn la be ber takk sekken grønnsaker
    """,
    "pl": """
        w i z na do nie że się jest są był była było być to ten ta te tego tej tym tych który która które którzy jak
        jako ale lub albo oraz czy co kto gdzie kiedy dlaczego jego jej ich ja ty on ona oni my wy mnie ciebie mu go
        po od za przed przez dla pod nad bez przy o u ze we już jeszcze tylko także też bardzo więc gdy jeśli aby żeby
        można może mogą musi ma mają każdy każda każdej każde wszystko wszystkie swój swoje swoją proszę ponieważ a
    """,
    "pt": """
        o os as um uma uns umas do da dos das no na nos nas ao aos à às pelo pela em e é são foi era ser está estão
        estar há não que quem com por para se seu sua seus suas lhe mas mais como muito também quando onde qual porque
        porquê já sem sobre entre até desde este esta estes esse essa isso isto ele ela eles elas você vocês nós eu tu
        me te meu minha minhas nem ou de a cada todo todos todas outro outra tem têm pode podem fazer durante enquanto
        depois antes assim num numa então foram
    """,
    "sv": """
        och att det som är en ett den de på för av med till inte har hade kan ska skall skulle vill kunde jag du han
        hon vi ni mig dig sig oss dem från om eller men när så här där vad vem hur varför var vara varit blir blev
        efter mellan genom bara lite mycket något någon några också både själv upp ut fram hem utan under över vid
        alla många min din sin vår deras hans hennes man eftersom än nu då varje sedan innan även mot kring vart
    """,
    "tr": """
        ve bir bu da de için ile çok daha en gibi kadar ama ancak fakat değil var yok olarak olan olduğu olduğunu olur
        oldu olabilir ne nasıl neden niçin niye kim hangi her bütün tüm şey ben sen o biz siz onlar onu ona onun bana
        sana beni seni benim senin bizim sizin kendi sonra önce göre karşı doğru üzerinde içinde arasında altında şu
        veya ya hem çünkü eğer ise mi mı mu mü diye böyle şöyle bunu bunun buna biri hiç bile artık lütfen dahil üzere
        herkes yeni sonunda zaman yardım iyi büyük küçük yapılır gerekir edilir eder ederim misin mısın musunuz
        üzerine üzerinden ardından yanında yerine birkaç pek gün zamanda kişi insan insanlar yer su ilk ikinci son
        yaşlı güzel olun edin yapın bulunur verir gelir gider dedi eski kenarında hemen belki tek oldukça özellikle
        örneğin sayesinde
    """,
}

LATIN_LETTERS = {
    "cs": "áčďéěíňóřšťúůýž",
    "da": "æøåé",
    "de": "äöüß",
    "en": "",
    "es": "áéíóúüñ",
    "fi": "äöå",
    "fr": "àâæçéèêëîïôœùûüÿ",
    "hu": "áéíóöőúüű",
    "it": "àèéìíîòóùú",
    "nl": "éëïóöüèê",
    "no": "æøåéòô",
    "pl": "ąćęłńóśźż",
    "pt": "áâãàçéêíóôõú",
    "sv": "åäöé",
    "tr": "çğıöşüâîû",
}

CYRILLIC_WORDS = {
    "ru": """
        и в не на что с он она они как это по но его её их из у за от для о же вы мы я ты так бы был была было были
        быть если когда или только ещё еще уже чтобы который которая которое которые кто где почему очень может можно
        нужно надо все всё всех также потом после до при через между без под над каждый каждое каждого него нее ним
        мне меня тебе вам нас вас свой свою эти этот эта чем во ко со пожалуйста поэтому потому есть один одна два три
        первый новый большой старый день дня время году лет человек люди людей жизнь дом сначала затем обычно часто
        всегда никогда иногда здесь там сейчас теперь снова опять хорошо много мало несколько другой другие около
        вокруг против благодаря например кроме того более менее самый сам себя себе вдруг сказал сделать даже ли ни
        вот
    """,
    "uk": """
        і й та в у не на що з із зі він вона вони як це по але його її їх їхній за від для про же ви ми я ти так би б
        був була було були бути якщо коли або чи тільки лише ще вже щоб який яка яке які хто де чому дуже може можна
        потрібно треба все всі всіх також потім після до при через між без під над кожен кожна кожне кожного нього неї
        ним мені мене тобі вам нас вас свій свою ці цей ця ніж тому якого якої будь ласка адже є один одна два три
        перший новий великий старий день дня час року років людина люди людей життя дім спочатку далі зазвичай часто
        завжди ніколи іноді тут там зараз тепер знову добре багато мало кілька інший інші біля навколо проти завдяки
        наприклад крім того більш менш сам себе собі раптом сказав зробити навіть ні ось
    """,
}

CYRILLIC_LETTERS = {
    "ru": "абвгдеёжзийклмнопрстуфхцчшщъыьэюя",
    "uk": "абвгґдеєжзиіїйклмнопрстуфхцчшщьюя",
}
