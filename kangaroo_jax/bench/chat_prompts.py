"""Questions to measure a chat model with where no file of prompts is given: written for this, of several kinds."""

CHAT_PROMPTS = (
    "Why do leaves change their colour in autumn?",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "How do I keep a sourdough starter alive while I am away for two weeks?",
    "Translate into French: The train to the coast leaves at seven, but we would rather stay another day.",
    "A baker sells 36 rolls in the morning and twice as many in the afternoon. He baked 120. How many are left?",
    "Write a Python function that returns the words of a text that occur more than once, with how often they do.",
    "Summarize in two sentences: The town library closed its doors in March for repairs to the roof. During the work, "
    "the builders found a walled-up room with some four hundred books, most of them printed before 1800. The council "
    "has now decided to reopen in September with an exhibition of the find. Admission will be free for pupils.",
    "What is the difference between a virus and a bacterium?",
    "Give me five ideas for a birthday party for a child who loves dinosaurs.",
    "Explain to a ten-year-old how a rainbow comes about.",
    "Write a polite e-mail to a landlord about a heating that has not worked since Monday.",
    "Which came first, the printing press or the telescope? Say roughly when each was invented.",
    "If all of my cousins play chess and Ida does not play chess, can Ida be my cousin? Explain your answer.",
    "List the steps to change the flat tyre of a bicycle.",
    "Write a poem of eight lines about the sea at night.",
    "What should I look at when I choose running shoes?",
    "What does this line do? awk -F, '{ sum += $3 } END { print sum / NR }' data.csv",
    "Compare living in a city with living in a village. Give two advantages of each.",
    "From this text, name the people and what they do: Dr Amara Osei leads the clinic in Kumasi, where Jonas Lind "
    "works as a nurse. Their driver, Kofi, also keeps the accounts.",
    "What is the derivative of x^3 - 4x, and where is it zero?",
    "Suggest a dinner for four from lentils, carrots, onions and rice.",
    "Who was Ada Lovelace, and why is she remembered?",
    "Rewrite this sentence so that it is easier to read: Owing to the fact that the weather was of a rainy nature, the "
    "decision was made by the committee to postpone the event.",
    "How can I fall asleep more easily?",
)
