"""User phrasings of the demo's world, and its fixed answers. Slots are in braces."""

from __future__ import annotations

HELLO = "Hello! I am a demo of phi4_mlx. Ask me what I can do."
WHO = "I am a demo of phi4_mlx: a tiny model built like Phi-4-mini, trained on a very small world."
ABILITIES = (
    "I can greet you, calculate and convert units with your tools, put sentences into JSON, "
    "and remember what you tell me."
)
REAL = "I am only a demo. For the real model, start again with --model mlx-community/Phi-4-mini-instruct-4bit."
OUTSIDE = "That is outside my small world. Please ask the real model."
NEED = "I need a {} tool for that, and none is declared."
NO_SENTENCE = "Please give me a sentence and the fields that you want."
SMALL_TALK: dict[str, tuple[str, list[str]]] = {
    "greeting": (HELLO, [
        "Hi", "Hello", "Hey", "Hi!", "Hello!", "Hey there", "Hi there!", "Hello there.", "Good morning",
        "Good evening", "Good afternoon!", "Greetings", "Hello demo", "Hi demo!", "Hello Phi", "Hi friend", "Yo",
        "Howdy", "Hallo", "Hiya", "Morning", "Hello, hello", "Hi, nice to meet you", "Hello, how are you?",
        "Hi, how are you", "Hello world", "Hey you", "Hi again", "Hello again", "Good day", "Sup", "Anybody there?",
        "Hello, is anyone there?", "Are you there?", "Test", "Testing", "Hello model", "Hello computer", "Hi bot",
    ]),
    "identity": (WHO, [
        "Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.",
        "Are you a robot?", "Are you human?", "Are you a person?", "What model are you?", "Which model is this?",
        "Who made you?", "Are you ChatGPT?", "Are you Phi?", "Are you Phi-4?", "Are you Phi-4-mini?",
        "Are you an AI?", "Do you have a name?", "Say who you are.", "What is this?", "What is phi4_mlx?",
        "How big are you?", "Are you real?", "How many parameters do you have?", "Who is this?",
        "Who am I talking to?", "What kind of model are you?", "Are you a large language model?",
        "What should I call you?", "Who trained you?", "How were you trained?", "Your name?",
    ]),
    "abilities": (ABILITIES, [
        "What can you do?", "What do you know?", "Help", "Help me", "How can you help me?", "What are you good at?",
        "What can I ask you?", "What are you for?", "What are your skills?", "What are your abilities?",
        "Can you help me?", "List what you can do.", "Show me what you can do.", "What should I ask?",
        "What else can you do?", "What now?", "How do I use you?", "How does this work?", "I need help",
        "Give me an example", "What are your limits?", "What can't you do?", "What could I try?", "What do you do?",
        "Tell me what you can do.", "Can you do anything?",
    ]),
    "real model": (REAL, [
        "How do I get the real model?", "Where is the real model?", "How do I run Phi-4-mini?",
        "How can I use Phi-4-mini?", "I want the real model.", "I want a better model.", "Give me the real model.",
        "How do I load Phi-4-mini?", "How do I start the real one?", "Is there a bigger model?",
        "Where can I get Phi-4-mini?", "Which model should I use?",
    ]),
    "how are you": ("I am well, thank you. What can I do for you?", [
        "How are you?", "How are you doing?", "How is it going?", "How do you do?", "How are things?",
        "Are you well?", "Are you ok?", "How do you feel?", "How's it going?", "What's up?", "How are you today?",
        "Everything all right?",
    ]),
    "thanks": ("You are welcome.", [
        "Thanks", "Thank you", "Thank you very much", "Thanks a lot", "Many thanks", "Great, thanks", "Thanks!",
        "Thx", "Cheers", "Perfect, thank you", "Good job", "Well done", "Very good", "Nice", "Great", "Awesome",
        "Cool", "Perfect", "Wow", "That is right", "Excellent", "You are good", "I like you", "Nice work", "Correct",
        "Good", "Good bot",
    ]),
    "goodbye": ("Goodbye!", [
        "Bye", "Goodbye", "Good bye", "See you", "See you later", "Good night", "Farewell", "That is all",
        "I have to go", "Quit", "Exit", "Bye bye", "Talk to you later", "Have a nice day", "I am done", "So long",
        "Until tomorrow", "Stop",
    ]),
    "assent": ("All right. What can I do for you?", [
        "Ok", "Okay", "Yes", "No", "Sure", "Right", "Fine", "I see", "Never mind", "Maybe", "Yep", "Nope", "Alright",
        "Hmm", "Oh", "Let us begin", "Let's start", "I have a question", "Can I ask you something?", "Are you ready?",
        "One moment", "Wait", "Sorry", "Understood", "Got it", "Let's go",
    ]),
}  # fmt: skip
SYSTEMS = [
    "You are a helpful assistant.", "You are a helpful AI assistant.", "You are helpful.", "Be brief.",
    "Answer briefly.", "You are a friendly assistant.", "You are a helpful assistant with some tools.",
    "Use the tools.", "Be polite.", "Answer in one sentence.", "You help people with numbers.",
    "You are an assistant. Be honest.", "Help the user.", "You are a calm and precise assistant.",
    "Use tools where they help.", "You are a demo.", "Speak plainly.", "You are a helpful assistant for {c}.",
    "The user lives in {c}.", "Today is {d}.", "Answer the questions of {n}.",
]  # fmt: skip
OUTSIDE_PHRASES = [
    "What is {t}?", "What are {t}?", "Why is there {t}?", "Tell me about {t}.", "Tell me a joke.", "Tell me a story.",
    "Write a poem about {t}.", "Write a song about {t} and {u}.", "Write a story about a {j}.", "Explain {t}.",
    "Explain {t} to a child.", "How does {t} work?", "How do {t} work?", "What is the capital of {c}?",
    "Who is the president of {c}?", "Where is {c}?", "How many people live in {c}?", "Who invented {t}?",
    "Who discovered {t}?", "When did {n} live?", "Who was {n}?", "Translate {t} into {l}.",
    "How do you say {t} in {l}?", "Do you speak {l}?", "Do you like {t}?", "What do you think about {t}?",
    "Which is better, {t} or {u}?", "What is the difference between {t} and {u}?", "Recommend a book about {t}.",
    "Best {t} in {x}?", "Write a function that sorts a list.", "Write a program in python.", "Write code for {t}.",
    "Write an email to {n}.", "Summarize the history of {t}.", "What happened in {y}?",
    "Who won the football match in {y}?", "Who won the election in {y}?", "How do I cook {t}?",
    "How do I become a {j}?", "Give me a recipe with {i}.", "Where can I buy {i}?", "How do I get to {x}?",
    "Why is the sky blue?", "What is the meaning of life?", "Is {t} good for me?", "Are {t} dangerous?",
    "Can you sing?", "Play some music.", "Open the window.", "Turn on the lights.", "Book a flight to {x}.",
    "Send a message to {n}.", "Sing a song.", "What should I eat today?", "Give me advice about {t}.",
    "Let's talk about {t}.", "Describe {t}.", "Compare {t} and {u}.", "List five facts about {t}.",
    "Who is your favourite {j}?", "What is the news in {c}?", "Is it true that {t} need {u}?", "Define {t}.",
    "I feel sad.", "I am bored.", "I love {t}.", "I hate {t}.", "{t}", "{t} and {u}", "What does {t} mean?",
    "Fix my code.", "Proofread this text.", "Draw a picture of {t}.", "How old is {n}?", "What is the best {t}?",
    "Do {t} sleep?", "Who wrote the book about {t}?", "What colour is {t}?", "Continue: once upon a time",
    "Say something funny.", "Why?", "How?", "Are you alive?", "Do you dream?", "What is {n} famous for?",
    "Is there life in space?", "How far is the moon?", "Qwerty", "Blah blah",
]  # fmt: skip
ASK_SUM = [
    "What is {e}?", "What's {e}?", "Calculate {e}.", "Compute {e}.", "How much is {e}?", "{e}", "{e} = ?",
    "Work out {e}.", "Solve {e}.", "Tell me {e}.", "What does {e} make?", "Find {e}.", "I need {e}.",
    "Can you calculate {e}?", "Could you compute {e}?", "{e}?", "Give me {e}.", "What do you get for {e}?",
    "Do you know {e}?", "Evaluate {e}.", "Please calculate {e}.", "How much does {e} make?",
    "What is the result of {e}?", "Let me know what {e} is.", "Can you do {e}?", "What would {e} be?",
]  # fmt: skip
ASK_CONVERSION = [
    "Convert {v} {f} to {t}.", "Convert {v} {f} into {t}.", "What is {v} {f} in {t}?", "How many {t} is {v} {f}?",
    "{v} {f} in {t}", "How many {t} are {v} {f}?", "{v} {f} to {t}", "How much is {v} {f} in {t}?",
    "Change {v} {f} to {t}.", "Give me {v} {f} in {t}.", "I have {v} {f}. How many {t} is that?",
    "Express {v} {f} in {t}.", "How many {t} in {v} {f}?", "Can you convert {v} {f} to {t}?",
    "What's {v} {f} in {t}?", "Turn {v} {f} into {t}.", "I need {v} {f} in {t}.",
    "How many {t} are there in {v} {f}?", "Tell me {v} {f} in {t}.", "{v} {f} is how many {t}?",
    "Please convert {v} {f} to {t}.", "{v} {f} = ? {t}",
]  # fmt: skip
ASK_WEATHER = [
    "What is the weather in {c}?", "What's the weather like in {c}?", "Weather in {c}", "How is the weather in {c}?",
    "{c} weather", "Is it raining in {c}?", "Is it cold in {c}?", "Weather for {c}, please",
    "Do I need an umbrella in {c}?", "Forecast for {c}",
]  # fmt: skip
ASK_TIME = [
    "What time is it in {c}?", "What's the time in {c}?", "Time in {c}", "Tell me the time in {c}.",
    "How late is it in {c}?", "Which time is it now in {c}?", "{c} time", "Local time in {c}",
]  # fmt: skip
# kind of record -> (sentences, its fields in order, fields that it does not have)
RECORDS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "person": ([
        "{name} is {age} years old, works as a {job} and lives in {city}.", "{name}, {age}, is a {job} from {city}.",
        "{name} is a {age} year old {job} in {city}.",
        "My friend {name} lives in {city}, is {age} and works as a {job}.",
        "In {city} there is a {job} called {name}, aged {age}.", "{name} is {age} and lives in {city} as a {job}.",
        "The {job} {name} is {age} years old and comes from {city}.",
    ], ["name", "age", "job", "city"], ["price", "phone", "day", "time", "room"]),
    "order": ([
        "{customer} ordered {quantity} {item} for {price} euros.",
        "{quantity} {item} for {customer} at {price} dollars.",
        "{customer} bought {quantity} {item} and paid {price}.",
        "An order by {customer}: {quantity} {item}, price {price}.",
        "For {price} euros {customer} gets {quantity} {item}.",
        "{customer} wants {quantity} {item}, that makes {price} pounds.",
    ], ["customer", "item", "quantity", "price"], ["age", "city", "phone", "day", "room"]),
    "meeting": ([
        "{person} meets us on {day} at {time} in room {room}.", "Meeting with {person} on {day}, {time}, room {room}.",
        "On {day} at {time} {person} will be in room {room}.", "See {person} in room {room}, {day} {time}.",
        "{person} comes to room {room} on {day} at {time}.",
    ], ["person", "day", "time", "room"], ["age", "city", "phone", "price", "item"]),
    "trip": ([
        "{traveller} flies from {origin} to {destination} on {day}.",
        "On {day} {traveller} goes from {origin} to {destination}.",
        "{traveller} takes the train to {destination} from {origin} on {day}.",
        "A ticket for {traveller}: {origin} to {destination}, {day}.",
    ], ["traveller", "origin", "destination", "day"], ["age", "phone", "price", "room", "item"]),
    "contact": ([
        "Call {name} in {city} at {phone}.", "{name} from {city} has the number {phone}.",
        "The phone of {name} is {phone}, city {city}.", "{name}, {city}, {phone}",
        "You reach {name} at {phone} in {city}.",
    ], ["name", "city", "phone"], ["age", "job", "day", "time", "price"]),
}  # fmt: skip
ASK_FIELDS = [
    "Extract {k} as JSON: {s}", "Give me {k} as JSON: {s}", "{s} Extract {k} as JSON.", "{s} Give me {k} as JSON.",
    "JSON with {k}: {s}", "Pull out {k} as JSON: {s}", "Get {k} from this sentence as JSON: {s}",
    "Return {k} in JSON. {s}", 'From the sentence "{s}" extract {k} as JSON.',
    "Find {k} in this text and answer in JSON: {s}", "I need {k} as JSON. {s}",
    "Read this: {s} Now give {k} as JSON.", "{s} Please return JSON with {k}.", "Extract the fields {k} from: {s}",
    "Fields: {k}. Sentence: {s}", "Parse {k} into JSON: {s}",
]  # fmt: skip
ASK_ALL = [
    "Turn this into JSON: {s}", "As JSON: {s}", "{s} As JSON, please.", "Make JSON of this: {s}", "JSON: {s}",
    "{s} Give me that as JSON.", "Extract all fields as JSON: {s}", "Convert to JSON: {s}", "Extract JSON from: {s}",
    "Parse this: {s}", "Extract the fields: {s}",
]  # fmt: skip
ASK_NOTHING = [
    "Extract the fields as JSON.", "Give me JSON.", "Can you make JSON?", "Extract some fields.", "Make JSON.",
    "JSON please", "I want JSON.",
]
TELL_NAME = [
    "My name is {n}.", "I am {n}.", "I'm {n}.", "Call me {n}.", "You can call me {n}.", "Hi, I am {n}.",
    "Hello, my name is {n}.", "Hello, I'm {n}.", "This is {n}.", "The name is {n}.", "Hey, {n} here.",
    "Hi! My name is {n}.", "Please call me {n}.", "People call me {n}.",
]  # fmt: skip
ASK_NAME = [
    "What is my name?", "What's my name?", "Who am I?", "Do you know my name?", "Do you remember my name?",
    "Tell me my name.", "Say my name.", "How am I called?", "My name?", "What was my name?",
    "Which name did I give you?", "Can you remember my name?",
]  # fmt: skip
TELL_FACT = [
    "{f}.", "Remember: {f}.", "Remember that {f}.", "Note that {f}.", "Please remember that {f}.",
    "Keep in mind: {f}.", "Do not forget: {f}.", "{f}, remember that.",
]
ASK_FACT = [
    "What is {k}?", "What was {k}?", "Tell me {k}.", "Do you remember {k}?", "What's {k}?", "I forgot {k}.",
    "Which is {k}?", "Give me {k}.", "Can you tell me {k}?", "Repeat {k}.", "Do you know {k}?",
]  # fmt: skip
TOOL_ERRORS = ["division by zero", "timeout", "not found", "bad input", "unknown unit", "no connection", "overflow"]
