"""A hundred prompts for a real model: languages and scripts, emoji, code, odd texts, long ones."""

LANGUAGES = [
    "The best time to plant a tree was twenty years ago. The second best time is",
    "Die Eisenbahn von Nürnberg nach Fürth wurde im Jahr 1835",
    "Le chat dort sur le canapé, et pendant ce temps la souris",
    "En un lugar de la costa vivía un pescador que todas las mañanas",
    "A língua portuguesa é falada em vários países, entre eles",
    "Il treno per Torino parte alle otto e un quarto dal binario",
    "De fiets staat nog altijd tegen de muur, omdat",
    "Sommaren var kort, men ljuset på kvällarna",
    "Regnen startede om morgenen, og da vi kom hjem,",
    "Fjorden er dyp og vannet er",
    "Sumarið á Íslandi er stutt en",
    "Järven rannalla oli vanha mökki, jossa",
    "Eesti keeles on neliteist käänet, näiteks",
    "Wczoraj wieczorem poszliśmy do teatru, ale okazało się, że",
    "Příliš žluťoučký kůň úpěl ďábelské ódy. Potom",
    "Najvyšší vrch Slovenska je Gerlachovský štít a",
    "A kertben három almafa áll, és mindegyik",
    "Toamna, frunzele din parc cad încet și",
    "Lietuvos sostinė yra Vilnius, o didžiausia upė",
    "Pēc lietus mežā smaržo pēc",
    "Sonuç olarak bu kitabın en güzel bölümü",
    "Hà Nội là thủ đô của Việt Nam, và mùa thu ở đây",
    "Kesho asubuhi tutaenda sokoni kununua",
    "Gobe zan tafi kasuwa domin in sayi",
    "Bahasa Indonesia adalah bahasa resmi, dan",
    "Ang pinakamataas na bundok sa Pilipinas ay",
    "Ko te reo Māori tētahi o ngā reo",
    "Is fearr Gaeilge bhriste ná Béarla cliste, mar",
    "Mae hen wlad fy nhadau yn annwyl i mi, ac",
    "Kio estas la plej facila lingvo? Esperanto, ĉar",
    "Москва стоит на берегу реки, а Петербург",
    "Київ — столиця України, а Дніпро",
    "София е столицата на България и се намира",
    "Ο ήλιος ανέτειλε πάνω από τη θάλασσα και",
    "Երևանը Հայաստանի մայրաքաղաքն է",
    "თბილისი საქართველოს დედაქალაქია და",
    "בירת ישראל היא ירושלים, והעיר הגדולה",
    "القاهرة هي عاصمة مصر، وهي",
    "تهران پایتخت ایران است و",
    "दिल्ली भारत की राजधानी है और",
    "ঢাকা বাংলাদেশের রাজধানী এবং",
    "சென்னை தமிழ்நாட்டின் தலைநகரம்",
    "กรุงเทพเป็นเมืองหลวงของประเทศไทย และ",
    "ភ្នំពេញជារដ្ឋធានី",
    "北京是中国的首都,那里的秋天",
    "臺北的捷運每天早上",
    "東京は日本の首都で、人口は",
    "서울은 대한민국의 수도이며",
    "አዲስ አበባ የኢትዮጵያ ዋና ከተማ",
    "ᐃᓄᒃᑎᑐᑦ ᐅᖃᐅᓯᖅ",
]
assert len(LANGUAGES) == 50

EMOJI = [
    "😀😃😄😁",
    "The weather today: ☀️ 🌤️ 🌧️ and tomorrow",
    "👩‍👩‍👧‍👦 is one family, 🏳️‍🌈 one flag, and 👍🏽",
    "I ❤️ pizza 🍕 because",
    "🇫🇷 Paris\n🇯🇵 Tokyo\n🇧🇷",
    "Roses are 🌹, violets are 💜,",
    "∀x ∈ ℝ: x² ≥ 0, and ∑ 1/n² =",
    "♔♕♖ ♞ 1. e4 e5 2.",
]

CODE = [
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "import numpy as np\n\ndef softmax(x):\n    ",
    "class Stack:\n\tdef __init__(self):\n\t\tself.items = []\n\n\tdef push(self, item):\n\t\t",
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n        printf(",
    "fn main() {\n    let mut v: Vec<u32> = Vec::new();\n    v.",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2020 GROUP BY",
    "const sum = (a, b) => a + b;\nconsole.log(",
    "<!DOCTYPE html>\n<html>\n  <head>\n    <title>",
    '{"name": "Ada", "born": 1815, "languages": ["',
    "#!/bin/bash\nfor file in *.txt; do\n  ",
    "main :: IO ()\nmain = do\n  putStrLn",
    "\\begin{equation}\n  E = m c^2\n\\end{equation}\n",
    "| city | country |\n|---|---|\n| Oslo | Norway |\n| Rome |",
    "diff --git a/x.py b/x.py\n@@ -1,3 +1,3 @@\n-print('hi')\n+",
    "name: ci\non: [push]\njobs:\n  test:\n    runs-on:",
    "^[a-z]+(\\d{3})?$ matches",
]

KNOWLEDGE = [
    "Question: What is the largest planet of the solar system?\nAnswer:",
    "Water boils at a temperature of",
    "1, 1, 2, 3, 5, 8, 13,",
    "Monday, Tuesday, Wednesday,",
    "12 + 30 = 42\n7 + 8 = 15\n21 + 9 =",
    "Dear Sir or Madam,\n\nI am writing to",
    "Once upon a time there was a king who",
    "Ingredients:\n- 200 g of flour\n- 2 eggs\n-",
]

ODD = [
    "a",
    " ",
    "\n\n\n",
    "        eight spaces before this",
    "tabs\tand\ttabs\t",
    "UPPER CASE ONLY IS",
    "!?!?!?...,,,;;;",
    "3.14159265358979323846264338327950288",
    "http://www.example.org/a?b=c&d=%20e#",
    "Z͑ͫ̓a̴l̵g̶o̷ text e\u0301 and \u00e9",
    "zero\u200bwidth \u200d and \u202eright to left\u202c",
    "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n",
]

# Each has some hundreds of tokens: other scripts take several for a character.
LONG = [
    " ".join(LANGUAGES[:16]),
    "\n".join(CODE) + "\n",
    "\n".join(f"{number} times 7 is {7 * number}." for number in range(1, 41)) + "\n41 times 7 is",
    " ".join(LANGUAGES[30:45]),
    "\n".join(KNOWLEDGE) + "\n".join(LANGUAGES[40:47]),
    "The quick brown fox jumps over the lazy dog. " * 30,
]

PROMPTS = [*LANGUAGES, *EMOJI, *CODE, *KNOWLEDGE, *ODD, *LONG]
assert len(PROMPTS) == len(set(PROMPTS)) == 100
