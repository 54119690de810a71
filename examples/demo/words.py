# ruff: noqa: SIM905
"""Values of the demo's world; `draw.py` decides which are held out."""

from __future__ import annotations

NAMES = (
    "Ada Adam Aiko Alan Alba Alice Amir Amy Ana Andre Anna Anton Aria Ben Bella Bruno Carla Carlos Chen Chloe Clara "
    "Daniel David Dina Diego Elena Eli Ella Emil Emma Eric Eva Fatima Felix Finn Fiona Frank Gabriel Grace Greta Hana "
    "Hannah Hugo Ida Igor Ines Ivan Jack James Jana Jin John Jonas Jose Julia Kai Karim Kate Kim Lara Laura Lea Leo "
    "Lena Liam Lina Lisa Louis Lucy Luis Luka Maria Mark Marta Mary Max Mei Mia Mike Milan Mina Nadia Nina Noah Nora "
    "Olga Oliver Omar Oscar Otto Pablo Paul Peter Petra Rita Robert Rosa Ruth Sam Sara Sofia Stefan Susan Tara Theo "
    "Thomas Tina Tom Uma Vera Victor Viola Walter Yara Yuki Zoe"
).split()
CITIES = (
    "Accra Amsterdam Ankara Athens Bangkok Barcelona Beijing Berlin Bern Bogota Boston Brussels Budapest Cairo Chicago "
    "Copenhagen Dakar Delhi Denver Dublin Geneva Hamburg Hanoi Havana Helsinki Istanbul Jakarta Kyiv Kyoto Lagos Lima "
    "Lisbon London Lyon Madrid Manila Melbourne Miami Milan Montreal Mumbai Munich Nairobi Naples Osaka Oslo Paris "
    "Perth Porto Prague Quito Rabat Riga Rome Santiago Seattle Seoul Shanghai Singapore Sofia Stockholm Sydney Tallinn "
    "Tokyo Toronto Tunis Turin Utrecht Valencia Vienna Vilnius Warsaw Zagreb Zurich"
).split()
JOBS = (
    "baker teacher doctor nurse pilot farmer painter lawyer driver writer singer carpenter chemist engineer gardener "
    "plumber tailor waiter librarian dentist actor barber butcher cook designer editor fisher guard judge mechanic"
).split()
ITEMS = (
    "apples pears books lamps chairs tables pens pencils cups plates bottles tickets shirts shoes hats keys candles "
    "notebooks oranges lemons tomatoes carrots batteries cables mirrors towels boxes bags stamps cards"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLOURS = "red blue green yellow black white brown grey pink purple orange silver golden".split()
PLACES = "old new small large north south east west upper lower first second left right inner outer".split()
ADJECTIVES = (*COLOURS, *PLACES)
OBJECTS = (
    "door gate box locker safe room shed garage tower cabin drawer cabinet vault bridge house boat car bicycle garden "
    "office kitchen cellar attic wagon train desk shelf chest barn mill window lamp table chair mirror clock bell wall "
    "roof stair hall tunnel pond tent camp stable shop store studio lift crate trunk suitcase basket barrel cart truck "
    "ship plane"
).split()

# Spellings of a unit -> its size in base units. The first spelling is the unit's name.
LENGTH = {
    ("km", "kilometers", "kilometres"): 1000.0, ("m", "meters", "metres"): 1.0, ("cm", "centimeters"): 0.01,
    ("miles", "mi"): 1609.344, ("feet", "ft"): 0.3048, ("inches", "in."): 0.0254, ("yards", "yd"): 0.9144,
}  # fmt: skip
MASS = {
    ("kg", "kilograms", "kilos"): 1.0, ("g", "grams"): 0.001, ("pounds", "lb", "lbs"): 0.45359237,
    ("ounces", "oz"): 0.028349523, ("tons", "tonnes"): 1000.0,
}  # fmt: skip
VOLUME = {
    ("liters", "litres", "l"): 1.0, ("ml", "milliliters"): 0.001, ("gallons", "gal"): 3.785411784,
    ("cups",): 0.2365882365, ("pints",): 0.473176473,
}  # fmt: skip
TIME = {
    ("hours", "h"): 3600.0, ("minutes", "min"): 60.0, ("seconds", "s"): 1.0, ("days",): 86400.0, ("weeks",): 604800.0,
}  # fmt: skip
SPEED = {("km/h", "kmh"): 1.0, ("mph",): 1.609344, ("m/s",): 3.6, ("knots",): 1.852}
TEMPERATURE = ("celsius", "fahrenheit", "kelvin")
DIMENSIONS = (LENGTH, MASS, VOLUME, TIME, SPEED)

WEATHER = "sunny rainy cloudy windy snowy foggy clear stormy dry cold warm hot mild".split()

# Subjects outside the demo's world.
COUNTRIES = (
    "France Germany Italy Spain Portugal Brazil Japan China India Kenya Egypt Canada Mexico Peru Chile Norway Sweden "
    "Finland Poland Greece Turkey Vietnam Australia Ireland Iceland Cuba"
).split()
TOPICS = (
    "love music history physics gravity dogs cats football chess war peace money politics philosophy art poetry "
    "dinosaurs space stars planets volcanoes oceans forests whales bees computers robots programming python java "
    "recursion databases networks security cooking pasta bread cheese wine coffee tea medicine vaccines cancer sleep "
    "dreams ghosts magic religion evolution atoms electrons photons electricity magnets engines rockets airplanes "
    "trains bicycles elections laws taxes stocks gold oil climate rain snow winter summer birthdays weddings school "
    "exams homework grammar spelling novels movies actors guitars pianos dancing swimming running yoga diets soup "
    "pizza chocolate sugar salt elephants tigers spiders snakes horses birds fish trees flowers roses mountains rivers"
).split()
LANGUAGES = "French German Spanish Italian Japanese Chinese Arabic Russian Latin Dutch Hindi Korean".split()
