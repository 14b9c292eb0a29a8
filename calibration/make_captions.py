"""Makes captions.txt, varied.txt and emoji-captions.txt: the same lines on every run.

    python calibration/make_captions.py

Captions are only encoded, never drawn, so what counts is that their words are many and that they stand in the ways prompts do. Every word
list is the project's own; the emoji names are those of models/emoji-sdxl/prompts.txt that emoji-judge.txt does not ask for.
"""

import random
from pathlib import Path

HERE = Path(__file__).parent
COUNT = 3000
VARIED = 48

SUBJECTS = """
an old fisherman|a young woman with freckles|a child with a red balloon|two friends on a bench|a grandmother knitting|a jazz trumpeter|a ballet dancer
a firefighter|a chess player|a street vendor|an astronaut|a knight in dented armor|a wizard with a crooked staff|a pirate captain|a samurai|a cyclist
a mountain climber|a surgeon|a schoolteacher|a violinist|a blacksmith|a bride and groom|a sleeping baby|a detective in a trench coat|a robot gardener
a cyborg|a mermaid|a dragon|a phoenix|a unicorn|a werewolf|a ghost|a zombie|an alien diplomat|a golden retriever|a tabby cat|a black horse|a red fox
a barn owl|a humpback whale|a sea turtle|a hummingbird|a snow leopard|an elephant and its calf|a pair of swans|a honeybee on clover|a jumping spider
a school of silver fish|a raccoon|a hedgehog|a flamingo|a koala|a polar bear|a chameleon|a goldfish|a rooster|a highland cow|an octopus|a lighthouse
a wooden cabin|a glass skyscraper|a gothic cathedral|a ruined temple|a windmill|a suspension bridge|a treehouse|a greenhouse|a subway station|a library
a diner|a lunar base|a space station|a floating island|a walled medieval town|a neon alley|a harbor full of boats|a vineyard|a rice terrace
a sand dune|a waterfall|a frozen lake|a volcano|a canyon|a coral reef|a bamboo grove|a meadow of poppies|a birch forest|a thunderstorm over plains
the northern lights|a spiral galaxy|a comet|a bowl of ramen|a stack of pancakes|a loaf of sourdough|a cup of espresso|a slice of lemon tart|sushi on slate
a farmers market stall|a birthday cake|a glass of iced tea|a charcuterie board|a ripe peach|a basket of mushrooms|a vintage car|a steam locomotive
a sailboat|a hot air balloon|a motorcycle|a bicycle with a basket|a cargo plane|a spaceship|a tractor|a red double-decker bus|a pocket watch
an antique globe|a typewriter|a leather armchair|a grand piano|a porcelain teapot|a stained glass window|a pair of sneakers|a mechanical keyboard
a bouquet of peonies|a potted fern|a crystal skull|an open book|a paper lantern|a chessboard|a wool sweater|a diamond ring|a camera on a tripod
a circuit board|a marble bust|a wooden mask|a suit of armor|a map of an imaginary country|a logo of a bear|an icon of a cloud|an infographic about bees
""".replace("\n", "|").split("|")

DOING = """
|||||||reading a letter|looking out of a window|walking in the rain|laughing|covered in moss|half buried in snow|made of paper|made of glass|made of yarn
wearing sunglasses|under a full moon|at dawn|at sunset|in thick fog|in heavy rain|surrounded by fireflies|reflected in a puddle|seen from above
seen from far below|behind a chain fence|in an empty room|on a cliff|on a busy market square|in a desert|underwater|in outer space|in a kitchen
in a cluttered workshop|in a snowy village|in a neon-lit street|in an overgrown garden|beside a river|on a rooftop|inside a bottle|on a theater stage
in front of a brick wall|on a white background|during a festival|in zero gravity|with long shadows|wrapped in fog|next to a tiny house|in a hall of mirrors
""".replace("\n", "|").split("|")[1:-1]

STYLE = """
||||photograph|oil painting|watercolor|pencil sketch|charcoal drawing|ink drawing|woodcut|linocut print|pastel drawing|gouache|fresco|mosaic|embroidery
3D render|isometric render|low poly|pixel art|vector art|flat illustration|children's book illustration|comic book panel|manga page|anime style|ukiyo-e
art nouveau poster|art deco poster|bauhaus poster|travel poster|movie still|film noir|documentary photo|polaroid|daguerreotype|macro photograph
aerial photograph|long exposure|double exposure|studio portrait|product photo|food photography|fashion photography|architectural rendering|blueprint
concept art|matte painting|claymation|stop motion|graffiti|sticker design|tattoo design|stained glass style|impressionist|expressionist|cubist
surrealist|baroque painting|renaissance painting|minimalist|vaporwave|cyberpunk|steampunk|solarpunk|gothic|retro futurism
""".replace("\n", "|").split("|")[1:-1]

LOOK = """
||||||highly detailed|soft light|golden hour|dramatic lighting|rim light|volumetric light|shallow depth of field|wide angle|telephoto|35mm film|8k|4k
grainy|muted colors|vivid colors|monochrome|black and white|sepia|pastel colors|teal and orange|high contrast|low key|high key|symmetrical composition
close-up|full body|bird's-eye view|worm's-eye view|bokeh|sharp focus|hazy|dreamy|moody|cheerful|eerie|serene|chaotic|award winning|trending
intricate patterns|simple shapes|thick brush strokes|clean lines|by candlelight|by moonlight|overcast sky|clear blue sky|rainy mood
""".replace("\n", "|").split("|")[1:-1]


def caption(rng):
    subject, doing, style, look, more = (rng.choice(words) for words in (SUBJECTS[1:-1], DOING, STYLE, LOOK, LOOK))
    if rng.random() < 0.12:
        subject = f"{subject} and {rng.choice(SUBJECTS[1:-1])}"
    thing = " ".join(part for part in (subject, doing) if part)
    looks = [part for part in dict.fromkeys((look, more)) if part]
    if style and rng.random() < 0.4:
        return ", ".join([f"{style} of {thing}", *looks])
    return ", ".join(part for part in [thing, style, *looks] if part)


def subject_of(prompt):
    for start in ("an emoji of a ", "an emoji of an ", "a picture of a ", "a picture of an "):
        if prompt.startswith(start):
            return prompt[len(start):]
    return prompt


def lines(path):
    return [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]


def main():
    rng = random.Random(0)
    captions = {}
    while len(captions) < COUNT:
        captions[caption(rng)] = None
    head = f"# {COUNT} captions for SDXL, made by make_captions.py from word lists of its own. They are encoded, not drawn.\n"
    (HERE / "captions.txt").write_text(head + "\n".join(captions) + "\n")

    drawn = list(captions)[:: COUNT // VARIED][:VARIED]
    head = f"# {VARIED} calibration prompts for SDXL, of captions.txt: varied calibration is worth as much as the solver.\n"
    (HERE / "varied.txt").write_text(head + "\n".join(drawn) + "\n")

    judged = {subject_of(prompt) for prompt in lines(HERE / "emoji-judge.txt")}
    names = [name for name in lines(HERE.parent / "models/emoji-sdxl/prompts.txt") if name not in judged]
    with_article = lambda name: ("an " if name[0] in "aeiou" else "a ") + name
    forms = (str, lambda name: "an emoji of " + with_article(name), lambda name: "a picture of " + with_article(name))
    # Each third of the file has every name once.
    emoji = [forms[(turn + number) % 3](name) for turn in range(3) for number, name in enumerate(names)]
    head = f"# {len(emoji)} captions for models/emoji-sdxl: its names but for those that are judged by, in three ways each. Made by make_captions.py.\n"
    (HERE / "emoji-captions.txt").write_text(head + "\n".join(emoji) + "\n")


if __name__ == "__main__":
    main()
