"""Invented rows with the fields of each dataset."""

SCIENCE = {
    "choices": {"text": ["a stone", "the sun", "a spoon"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
#: Dataset folder → its rows; labels differ, so that a metric has something to tell apart.
ROWS = {
    "squad": [
        {
            "id": "q1",
            "title": "Lanterns",
            "context": "The harbour was lit by forty lanterns.",
            "question": "How many lanterns were there?",
            "answers": {"text": ["forty", "forty lanterns"], "answer_start": [23, 23]},
        },
        {
            "id": "q2",
            "title": "Lanterns",
            "context": "Greta painted the bridge.",
            "question": "What did she paint?",
            "answers": {"text": ["the bridge"], "answer_start": [14]},
        },
    ],
    "dialogsum": [
        {
            "id": "d1",
            "dialogue": "#Person1#: Tea?\n#Person2#: Please.",
            "summary": "#Person2# wants tea.",
            "topic": "tea",
        },
        {"id": "d2", "dialogue": "#Person1#: Late again!", "summary": "#Person1# complains.", "topic": "work"},
    ],
    "iwslt2017_de_en": [
        {"translation": {"de": "Der Hund schläft heute lange.", "en": "The dog sleeps long today."}},
        {"translation": {"de": "Wir bauen ein kleines Boot.", "en": "We are building a small boat."}},
    ],
    "gsm8k": [
        {"question": "Two boxes of 600 nails?", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"},
        {"question": "Three less than one?", "answer": "1-3=-2\n#### -2"},
    ],
    "boolq": [
        {"question": "is the tower made of cork", "passage": "The tower is made of stone.", "answer": False},
        {"question": "is the bell old", "passage": "The bell is very old.", "answer": True},
    ],
    "piqa": [
        {"goal": "Dry a cup.", "sol1": "Use a towel.", "sol2": "Use a lamp and some rain.", "label": 0},
        {"goal": "Find a key", "sol1": "Sing.", "sol2": "Look below the mat.", "label": 1},
    ],
    "social_i_qa": [
        {
            "context": "Otto lent Rosa a book.",
            "question": "How does Rosa feel?",
            "answerA": "angry",
            "answerB": "grateful to him",
            "answerC": "cold",
            "label": "2",
        }
    ],
    "hellaswag": [
        {
            "activity_label": "Baking bread",
            "ctx_a": "A man kneads  dough.",
            "ctx_b": "he then",
            "ctx": "A man kneads  dough. he then",
            "endings": ["[step] bakes it.", "sings [title] Wash it", "paints it [header] blue.", "sleeps."],
            "label": "0",
        },
        {
            "activity_label": "Rowing",
            "ctx_a": "Two boats race. [title] Start",
            "ctx_b": "",
            "ctx": "Two boats race. [title] Start",
            "endings": ["They fly.", "One wins by a length.", "Rain.", "Stop"],
            "label": "1",
        },
    ],
    "winogrande": [
        {"sentence": "Ida thanked Kate because _ had helped.", "option1": "Ida", "option2": "Kate", "answer": "2"},
        {"sentence": "The cup fell off the shelf as the _ was wet.", "option1": "cup", "option2": "sea", "answer": "1"},
    ],
    "arc_easy": [{"question": "What warms the Earth?", **SCIENCE}],
    "arc_challenge": [{"question": "Which one glows?", **SCIENCE}],
    "openbookqa": [{"question_stem": "Plants need light from", **SCIENCE}],
    "sst2": [{"sentence": "a warm , clever film ", "label": 1}, {"sentence": "dull ", "label": 0}],
    "mrpc": [
        {"sentence1": "Prices rose .", "sentence2": "Prices went up .", "label": 1},
        {"sentence1": "Prices rose .", "sentence2": "It rained .", "label": 0},
    ],
    "cola": [{"sentence": "Book the read he.", "label": 0}, {"sentence": "He read the book.", "label": 1}],
    "qnli": [
        {"question": "Who rang?", "sentence": "Vera rang the bell.", "label": 0},
        {"question": "Who rang?", "sentence": "The bell is big.", "label": 1},
    ],
    "rte": [
        {"sentence1": "Tom owns a red hat.", "sentence2": "Tom owns a hat.", "label": 0},
        {"sentence1": "Tom owns a hat.", "sentence2": "Tom owns a boat.", "label": 1},
    ],
    "stsb": [
        {"sentence1": "A dog runs.", "sentence2": "A dog is running.", "label": 4.75},
        {"sentence1": "A dog runs.", "sentence2": "Rain falls.", "label": 0.3},
        {"sentence1": "A dog runs.", "sentence2": "A cat runs.", "label": 2.0},
    ],
    "qqp": [
        {"question1": "How old is it?", "question2": "What is its age?", "label": 1},
        {"question1": "How old is it?", "question2": "Where is it?", "label": 0},
    ],
    "mnli": [
        {"premise": "It rains.", "hypothesis": "It is wet ", "label": 0},
        {"premise": "It rains.", "hypothesis": "It is Monday.", "label": 1},
        {"premise": "It rains.", "hypothesis": "The sky is clear.", "label": 2},
    ],
}
