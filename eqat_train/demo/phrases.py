"""Sentences and parts of sentences that every plot draws on: rule name, then its variants."""

from __future__ import annotations

from .grammar import Rules, parse_variants

__all__ = ["PHRASES", "parse_rules"]


def parse_rules(text: str) -> Rules:
    """Rules from blocks ``name:`` followed by variants, each starting with "- "; a blank line ends a block."""
    rules = {}
    for block in text.strip().split("\n\n"):
        head, body = block.split("\n", 1)
        (rules[head.strip().removesuffix(":")],) = parse_variants(body)
    return rules


PHRASES = parse_rules("""
open:
- Once upon a time, {hero.intro} lived in {hero.home} {region}.
- Once there was {hero.intro} who lived in {hero.home} {region}.
- There once lived {hero.intro} whose home was {hero.home} {region}.
- In {hero.home} {region} lived {hero.intro}.
- Long ago, {hero.intro} lived {region}, in {hero.home} that smelled of [hay|wood|honey|rain|apples].
- {region}, in {hero.home}, lived {hero.intro}.
- Everyone who lived {region} knew {hero}, the {hero.adj} {hero.kind}.
- This is the story of {hero}, {hero.a} who lived in {hero.home} {region}.
- {hero} was {hero.a} who lived {region}[| with {hero.His} family].
- Have you heard of {hero}? {hero.He} was {hero.a} who lived in {hero.home} {region}.
- {hero} and {elder} lived together in {hero.home} {region}. {hero} was {hero.a}[ with big dreams| with a warm
  heart|].
- Not so long ago, when {sight}, {hero.intro} lived in {hero.home} {region}.

likes:
- {hero.he} [loved|liked] to {act.base}[| and to {act2.base}].
- Most of all {hero.he} liked to {act.base}.
- Every [morning|evening|Sunday] {hero.he} [would {act.base}|liked to {act.base}], and nobody [did|could do] it
  better.
- When the work was done, {hero.he} [used to {act.base}|always {act.past}].
- {hero.he} was happy there, for {hero.He} could {act.base} [all day long|as much as {hero.He} liked].
- There was nothing that {hero.he} [enjoyed|loved] more than to {act.base}.
- {hero.he} could {act.base} better than anyone else[ in the village| in the valley|].
- On [quiet|rainy|sunny|long] days {hero.he} {act.past} or {act2.past}.

oneday:
- One {time},
- One {day} {time},
- One {day} {season} {time},
- Early one {time} in {month},
- On a% {day} {time} in {month},
- One day, when {sight2},
- In {month}, when {sight2},
- It was {season}, and {sight2}. One {time},
- One {time} in {month}, while the others were still [asleep|busy|at breakfast],
- The next {season},

later:
- The next [morning|day],
- A few days later,
- Two days later,
- When the week was over,
- Before the sun was up,
- That same [evening|day],
- As soon as it was light,

sad:
- {$1.he} felt [very sad|terrible|quite alone|small and helpless].
- A tear ran down {$1.his} cheek.
- {$1.he} [sighed|swallowed hard|stood there like a stone|did not know what to do].
- {$1.his} heart [sank|was heavy|beat fast].
- "Oh no!" [cried|sighed|whispered] {$1}. "What [shall|can] I do now?"
- {$1.he} [tried not to cry|bit {$1.His} lip], but it was of no use.

glad:
- {$1.he} [laughed|smiled|jumped] for joy.
- {$1.he} was so [happy|glad|delighted] that {$1.He} [danced|sang|hugged everyone|clapped {$1.His} {$1.hands}].
- "Hooray!" [cried|shouted|called] {$1}.
- {$1.his} eyes [shone|sparkled|grew wide].
- {$1.he} had not felt so [happy|light|proud] for a long time.
- Nobody in the whole [valley|village|world] was happier than {$1}.
- {$1.he} did not know whether to laugh or to cry.

meet:
- Just then {helper.intro} came [along|down the path|around the corner].
- On the way {hero.he} met {helper.intro}.
- Then {hero.he} heard a [soft|deep|kind] voice. It belonged to {helper.intro}.
- There, {lair2}, sat {helper.intro}.
- {helper.intro}, who lived nearby, [looked up|stopped|came closer].
- After a while {hero.he} saw {helper.intro}, who was resting {place2.in}.
- By good luck, {helper.intro} was [passing by|on the way home {place2.from}|gathering firewood nearby].

ask:
- "What is the matter?" asked {helper}.
- "Why do you look so [sad|worried|unhappy]?" asked {helper}.
- "You look [sad|worried|tired]," said {helper}. "Tell me [all about it|what happened]."
- "Good {time}, little friend," said {helper}. "Can I help you?"
- "My dear {hero.kind}," said {helper}, "what has happened to you?"
- {helper} asked what was wrong.

thanks:
- "Thank you, {$2}!" said {$1}. "[I will never forget this|You are a true friend|Without you I would have been lost]."
- "How can I [ever thank|repay] you?" asked {$1}. {$2} only [smiled|laughed]. "[Be kind to others|Come and visit me],"
  {$2.He} said.
- {$1} thanked {$2} [again and again|with all {$1.His} heart|a hundred times].
- {$1} hugged {$2}. "[You saved the day|I am so glad that I met you]," {$1.He} said.
- "You are the [best|kindest] {$2.kind} in the world," said {$1}, and {$2} [blushed|smiled|laughed].
- {$1} gave {$2} {snack.a} to say thank you, and they [shared|ate] {snack.them} together.

walk:
- They walked {place.to} side by side.
- Together they set out, and the path led them past the {place2.noun}.
- They crossed [a field|a stream|the lane|two fences] and climbed [a hill|over a wall|a steep bank].
- The way was long, but {$1} [sang|hummed|told stories] so that it seemed short.
- First they went {place2.to}, and then they turned [left|right|back to the lane].
- {$2} went first, and {$1} followed close behind.
- [Step by step|Slowly|Quickly and quietly] they made their way {place.to}.

supper:
- That evening they [ate|had|shared] {meal.a} and {eve.past}.
- {elder} had made {meal.a}, and everybody [ate until they were full|had two helpings|asked for more].
- In the evening they sat by the [fire|window|stove] and ate {meal.a}.
- {elder} put {meal.a} on the table, and {hero} told the whole story [twice|from beginning to end].
- At home there {meal.was} {meal.a} for supper, and {hero.he} invited {$1} to stay.

night:
- Then the [moon|first star] came out, and {hero.he} fell asleep with a smile.
- That night {hero.he} dreamed of {$1}.
- {hero.he} went to bed [tired|late] but very happy.
- When {hero.he} was in bed, {elder} whispered, "I am proud of you."
- Outside the [wind sang|rain fell softly|owls called], but inside it was [warm|quiet and warm].

friends:
- From that day on, {hero} and {$1} were the best of friends.
- After that, {hero} and {$1} met [every day|each Sunday|whenever they could] to {act.base}.
- And so {hero} found a friend in {$1}, [who loved to {act2.base}|and neither of them was ever lonely again].
- Since then {hero} and {$1} have always helped each other.
- {$1} taught {hero} how to {act2.base}, and {hero} taught {$1} how to {act.base}.
- Even when they were [old and grey|far apart], {hero} and {$1} stayed friends.

elder:
- {elder} [always said|used to say|often said] that [a good heart finds a way|every knot can be untied|small steps go
  far].
- "[Patience is better than strength|Ask when you need help|Kindness costs nothing]," {elder} used to say.
- {hero} thought of {elder}, who [never gave up|was never afraid|always knew what to do].
- "What would {elder} do?" thought {hero}.

elder_waits:
- {hero} had not seen {elder.Him} since the [summer|spring|first snow]
- the way there was long and steep
- {elder.He} was always waiting for a visit

oneevening:
- One warm evening
- One {season} evening in {month}
- One evening, when the heat of the day was over,
- One still evening

pal:
- {hero.his} best friend was {$1}, {$1.a}.
- Next door lived {$1.intro}.
- {hero.he} had a friend whose name was {$1}, {$1.a} who liked to {act2.base}.
- {$1}, {$1.a}, lived nearby, and the two were good friends.
- With {$1}, {$1.a}, {hero.he} shared every secret.
""")
