"""Plots about growing, baking, building, playing and mending."""

from __future__ import annotations

__all__ = ["PLOTS"]

PLOTS = """
garden thing=crop season=spring

- <open>

- {hero.he} had a small garden, and in it {hero.He} wanted to grow {thing.a}.
- One day {elder} gave {hero} a handful of seeds. "These will be {thing.noun}," said {elder}.
- {hero.he} wished for nothing more than {thing.a} from a garden of {hero.His} own.

- <oneday> {hero.he} dug the soil, put the seeds into it and covered them well.
- In {month} {hero} planted the seeds in [three|four|five] neat rows.

---

- {hero.he} waited and waited, but nothing grew.
- Every morning {hero} ran into the garden to see {thing.the}, but the soil stayed [bare|brown|dry].
- After a week a few green tips came up, but soon they turned [yellow|brown] and hung their heads.

- <sad hero>
- "Grow!" {hero} [shouted|begged]. The seeds did not listen.

- <meet> <ask>

- "{thing.my} will not grow," said {hero}. {helper} [put a {helper.hand} on the soil|smelled the soil|looked at the
  sky]. "It is too [dry|hard]," {helper.He} said.
- {hero.he} showed {helper} the garden. "You must give them water every evening," said {helper}, "and then you must
  wait."
- "[The crows|The snails] eat the young leaves," said {helper}. "You need {guard.a}."

- {helper} helped {hero.him} to [carry water {place2.from}|loosen the soil|pull out the weeds].
- So {hero} carried water {place2.from} each evening, [two|three|four] buckets full, even when {hero.He} was tired.
- Together they worked until the sun went down.

---

- The weeks went by, and when {summer_sight}, the garden was full of {thing.noun}.
- Then the rain came and after it the sun, and one morning there {thing.was} {thing.a} wherever {hero.he} looked.
- At last the first {thing.noun} were ripe. They were so big that {hero.he} needed both {hero.hands} to lift one.

- <glad hero>

- {hero.he} brought the biggest ones to {helper} and the rest to {elder}, who made {meal.a}.
- There were far too many for one {hero.kind}, so {hero.he} gave a basket to everyone who lived nearby.
- {hero.he} took {thing.the} {place.to} and won a prize, which {hero.He} shared with {helper}.

- "[Good things take time|A garden grows on patience]," said {helper}, and {hero} [nodded|agreed].
- {hero.he} kept a few seeds for the next year, and {hero.He} gave the others to {friend}, who wanted a garden too.
- <thanks hero helper>
? <friends helper>
=====
trade thing=baking thing2=ingredient thing3=ingredient

- <open> <pal friend> {hero} was known for {thing.a} that nobody else could make.
- <open> It was {hero.his} job to bake {thing.a} for the [summer feast|harvest feast|wedding|birthday] of {elder}.

- <oneday> {hero.he} wanted to bake {thing.a}, because the next day was the birthday of {elder}.
- <oneday> {hero} began to bake, for in the evening there was to be a feast.

- But when {hero.he} opened the cupboard, there {thing2.was} no {thing2.noun} left.
- "Oh dear," said {hero}. "I have no {thing2.noun}. Without {thing2.noun} I cannot bake."

---

- So {hero.he} went to {helper.intro}. "Please give me some {thing2.noun}," {hero.He} said.
- {helper.intro} always had {thing2.noun}. So {hero} went there and asked.

- "I will give you some {thing2.noun}," said {helper}, "if you bring me {goods.a}."
- "Gladly," said {helper}, "but first I need {goods.a}. Mine {goods.is} [worn out|lost|broken]."

- {hero.he} did not have {goods.one}, but {friend} had. "You may have {goods.the}," said {friend}, "if you bring me
  some {thing3.noun}."
- So {hero} went to {friend}, who owned {goods.a}. "Take {goods.them}," said {friend}, "but bring me some
  {thing3.noun} first."

- {hero.he} thought hard. There {thing3.was} some {thing3.noun} at the house of {rival}, who [never gave anything
  away|was said to be mean].
- Only {rival} had {thing3.noun}, and {rival.He} wanted [a song|a story|a good joke] for it. So {hero} [gave
  {rival.Him} the best one|did {hero.His} best].

- "[Sweep my yard|Wash my windows|Chop my wood], and you shall have it," said {rival}. {hero} worked until noon.
- {hero.he} told {rival} about the feast. "Nobody ever invites me," said {rival}. "Then I invite you," said {hero}.

---

- So {rival} gave {hero.Him} {thing3.the}, {hero} took {thing3.the} to {friend}, {friend} handed over {goods.the}, and
  {helper} was so pleased with {goods.the} that {helper.He} gave {hero.Him} plenty of {thing2.noun}.
- {hero.he} ran from {rival} to {friend} with {thing3.the}, and from {friend} to {helper} with {goods.the}. In the end
  {hero.He} held {thing2.the}.

- Now {hero} could bake at last, and soon the smell of {thing.the} filled the street.
- {hero.he} mixed and stirred, and before the clock struck [four|five|six], {thing.full} stood on the table.

- {elder} tasted a bit. "This is the best {thing.noun} that you have ever made," {elder.He} said.
- "How did you make {thing.it}?" asked {elder}. {hero} smiled. "With a little help," {hero.He} said.

- Everyone was invited, {helper} and {friend} and even {rival}, and not a crumb was left.
- {helper}, {friend} and {rival} came too, and they all [danced|sang|laughed] until late at night.

- <supper rival>
- And {hero} learned that many small gifts make one big one.
- From then on there {thing2.was} always enough {thing2.noun} in the cupboard.
=====
build thing=craft thing2=patch

- <open> <likes>

? <pal friend>

- {hero.his} greatest wish was to build {thing.a}.
- {hero.he} had seen {thing.a} in a book, and now {hero.he} wanted to build one {hero.Himself}.
- "I will build {thing.a}," {hero} told {elder}, "and it will be the best one in the valley."

- <oneday> {hero.he} began to saw and hammer. It took [three|four|five] days.
- <oneday> {hero.he} gathered wood and nails and worked from morning till evening.

---

- But when {hero} tried out {thing.the}, it [broke in two|fell to pieces|tipped over|shook and creaked].
- At last {thing.the} was ready. {friend} came to see it, and at that very moment it [broke|fell over|came apart].

- {rival} laughed when {rival.He} saw it. "[You will never do it|That is a heap of sticks, and no {thing.noun}]!"
- {rival}, who was watching, laughed out loud. "What is that supposed to be?" {rival.He} asked.
- <sad hero>

- <elder>
- "Everything goes wrong the first time," said {elder}. "Try again."

- <meet> <ask>
- {hero.he} went to {helper.intro}, who knew a lot about such things.

- {helper} looked at {thing.the} from all sides. "You need {thing2.a}," {helper.He} said, "and you must [measure
  twice|begin at the bottom]."
- "[The wood is too thin|The corners are weak]," said {helper}. "With {thing2.a} it will hold."

- {hero.he} found {thing2.a} {spot} and brought {thing2.them} back.
- {friend} had {thing2.a} at home and was glad to give {thing2.them} away.

---

- This time {hero} worked slowly, and {helper} [held the wood|handed {hero.Him} the nails|showed {hero.Him} how to tie
  good knots].
- They began again, and {hero} used {thing2.the} just as {helper} had said.

- When the new {thing.noun} was finished, it was [strong|beautiful], and it did not [break|tip over|creak] at all.
- And look! {thing.the} [held|stood firm], even when {hero} and {friend} jumped on it.

- <glad hero>

- {rival} did not laugh any more. "May I [try it|help you next time]?" {rival.He} asked, and {hero} said yes.
- Even {rival} had to admit that it was {thing.a}. "Will you teach me?" {rival.He} asked.

- <thanks hero helper>
- "Whoever falls can get up again," said {helper}, "and whoever gets up again can build {thing.one}."

- They gave {thing.the} a name. They called it "{craftname}."
- That year everyone came {place.to} to see {thing.the}.
? <night helper>
=====
music thing=instrument

- <open>

- In the attic {hero} found {thing.a} that had belonged to {elder}.
- {elder} gave {hero} {thing.a}. "I am too old to play it," {elder.He} said.
- {hero.he} wanted to be a musician, and {elder} bought {hero.Him} {thing.a} at the market.

- But when {hero.he} began to play, it sounded like [a creaking door|a hungry cat|a rusty wheel|a sick cow].
- The first sound that came out of {thing.the} was so awful that [the cat fled|the birds flew away|the milk turned
  sour].

---

- "Please stop!" cried {rival}. "[My ears hurt|Nobody can sleep]!"
- {rival}, who lived next door, shut all the windows. "You will never learn it," {rival.He} said.

- <sad hero>

- So {hero} went {place.to}, where nobody could hear {hero.Him}, and practised there every day.
- {hero.he} did not give up. {hero.He} practised {place.in} each morning, before anyone was awake.

- <meet> "You play with your heart," {helper.He} said, "but your {hero.hands} are in a hurry. Slowly!"
- <meet> {helper} listened for a while and said, "Listen to the [wind|rain|brook] first, and then play what you have
  heard."

- All through the {season} {helper} taught {hero.him} one tune after another.
- Day after day the tune grew [clearer|sweeter], and the birds [came back|began to sing along].

---

- Then came the day of the great feast. All the people had gathered {place2.in}, but the musician was [ill|late|stuck
  in the mud].
- In {month} there was a wedding, but the player who had been asked [had lost the way|lay ill in bed].

- "There will be no dance without music," everyone [sighed|said]. Then {elder} pushed {hero} forward.
- "Who can play for us?" asked the mayor. "I can," said {hero} in a small voice.

- {hero.his} {hero.hands} trembled, but {hero.He} saw {helper} in the crowd, and {hero.He} began to play {thing.the}.
- {hero.he} lifted {thing.the}, closed {hero.His} eyes and thought of {helper}.

- The tune rose into the air, as [clear as water|bright as the stars|light as a feather]. Everyone began to dance.
- At first there was silence. Then somebody began to [clap|hum], and soon the whole crowd was dancing.

- Even {rival} danced, and afterwards {rival.He} said, "Forgive me. I have never heard anything so beautiful."
- "Is that the same {thing.noun}?" asked {rival}. "Yes," said {hero}, "but it is no longer the same {hero.kind}."

- <glad hero>
- <thanks hero helper>

? Since then {hero} has played at every feast, and {rival} opens all the windows to listen.
=====
broken thing=fragile thing2=tool

- <open> {hero.his} neighbor was {helper}, {helper.a}.

- {helper} owned {thing.a} that was [a hundred years old|very dear to {helper.Him}], and nobody was allowed to touch
  it.
- In {helper.his} window stood {thing.a}. {hero} [looked at it every day|thought it the prettiest thing in the world].

- <pal friend>

- <oneday> {hero} and {friend} played ball in front of the house.
- <oneday> {hero.he} visited {helper}, who had just gone out to fetch {snack.a}.
- <oneday> {helper} asked {hero} to water the plants. "Be careful with {thing.full}," {helper.He} said.

---

- {hero.he} only wanted to look, but {hero.His} sleeve caught on {thing.the}. Crash! It lay on the floor in
  [three|five|a hundred] pieces.
- There was a loud crash. {thing.full} was broken!
- {hero.he} turned around too quickly, and {thing.the} fell down and broke.

- <sad hero>
- "Nobody saw it," said {friend}. "Say that it was [the wind|the cat]."
- "Let us run away," whispered {friend}.

- {hero.he} wanted to hide the pieces {spot}, but then {hero.He} thought of {elder}, who never told a lie.
- That night {hero} could not sleep. The pieces lay {spot}, where {hero.He} had hidden them.
- {hero.he} looked at the pieces for a long time. "No," {hero.He} said. "I will tell the truth."

- So {hero} went to {helper}. "I broke your {thing.noun}," {hero.He} said. "I am so sorry."
- When {helper} came back, {hero} stood at the door with the pieces. "It was my fault," {hero.He} said.

---

- {helper} was silent. Then {helper.He} sighed. "It was only {thing.one}," {helper.He} said. "But you told me the
  truth, and that is worth more."
- At first {helper} was [angry|sad]. But then {helper.He} said, "It takes courage to say that. Come, let us see what
  we can do."

- They sat down together and glued {thing.the}, piece by piece. It took all evening.
- {hero.he} wanted to pay for it, so {hero.He} took {thing2.a} and worked in {helper.his} garden for a week.

- Now there was a thin line in {thing.the}, but {helper} liked it even better than before. "This line will remind me
  of you," {helper.He} said.
- <later> {thing.the} stood in its place again, and only those who knew could see the cracks.

- {friend} was ashamed. "Next time I will tell the truth too," {friend.He} said.
- {helper} poured tea for {hero}, and they [laughed|talked] until it was dark.

- {hero.he} felt light again, because {hero.He} had nothing to hide.
- <friends helper>
=====
gift thing=present season=winter

- <open> {hero.his} best friend was {friend}, {friend.a}.
- {hero}, {hero.a}, and {friend}, {friend.a}, had been friends for as long as they could remember.

- Soon it would be the birthday of {friend}, and {hero} wanted to give {friend.Him} {thing.a}.
- In a shop window {hero} saw {thing.a}. "That would be the right present for {friend}," {hero.He} thought.

- But {hero} had only [two|three|four] small coins, and {thing.the} cost [ten|twelve|twenty].
- {hero.he} opened {hero.His} money box. There was nothing in it but [a button|a dead fly|one coin].

---

- <sad hero>
- <elder>

- So {hero} went to {helper.intro}. "Do you have any work for me?" {hero.He} asked.
- <meet> "Do you know how I can earn some money?" asked {hero}.

- "You can [sweep the floor|carry wood|wash the dishes|clean the windows]," said {helper}, "for one coin a day."
- {helper} let {hero.him} [carry baskets|chop wood|feed the animals], and every evening {helper.He} gave {hero.Him} a
  coin.

- {hero.he} worked hard all week. But on the last day, on the way home, {hero.He} saw {creature.a} that was
  [hungry|freezing], and {hero.He} spent all the coins on food for it.
- {hero.he} worked until {hero.His} {hero.hands} hurt. But when {hero.He} came to the shop, {thing.the} had been sold!

---

- "What shall I do now?" {hero} asked {helper}. "Make something yourself," said {helper}. "I will show you how."
- When {helper} heard of it, {helper.He} took a piece of wood and a knife from the shelf. "Let us make {thing.one}
  ourselves," {helper.He} said.

- All night long they [cut and carved|worked|sewed and glued], and in the morning {thing.a} lay on the table.
- It was not easy. {hero} [hurt {hero.His} thumb|had to begin three times], but at last {thing.the} was ready.

- When {friend} opened the box, {friend.He} [could not speak|gave a cry of joy|laughed]. "Did you make {thing.this}
  for me?"
- On {friend.his} birthday {hero} gave {friend} {thing.the}. "[It is the best present|I have never had anything so
  fine]," said {friend}.

- "A thing that you buy is soon forgotten," said {friend}, "but {thing.this} I will keep forever."
- {friend} hung {thing.the} by the window, where everybody could see it.

- <thanks friend hero>
- They ate {snack.a} and {eve.past} until the [stars came out|candles went out].
- Outside it was snowing, but the two friends sat by the fire and were warm.
"""
