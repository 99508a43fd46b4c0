"""Plots about neighbors, wishes and friendship."""

from __future__ import annotations

__all__ = ["PLOTS"]

PLOTS = """
newcomer thing=toy

- {hero.intro} had just moved to {hero.home} {region}, and {hero.He} did not know anybody.
- {hero.he} was new in the village. {hero.He} was {hero.a}, and {hero.He} lived in {hero.home} with {elder}.

- <likes> But alone it was no fun.
- From the window {hero.he} saw how the others {act.past}, but {hero.He} was too shy to join them.

- "Go out and say hello," said {elder}. But when {hero.he} stood before the others, {hero.He} could not say a word.
- "Nobody will like me," {hero.he} said. {elder} only [smiled|shook {elder.his} head].

---

- <oneday> {hero} took {thing.a} and went {place.to}.
- <oneday> {elder} gave {hero} {thing.a}. "Take {thing.this} along," {elder.He} said.

- There sat {friend.intro}, who looked [sad|bored].
- On a bench, all alone, sat {friend.intro}. {friend.He} had torn {friend.His} sleeve and was near to tears.

- {hero.his} heart beat fast, but {hero.He} went up to {friend.Him}. "Do you want to play with {thing.my}?" {hero.He}
  asked.
- For a while they only looked at each other. Then {hero} held out {thing.the}. "You can have a turn," {hero.He} said.

- {friend} looked up. "Really? I have never had {thing.one}," {friend.He} said.
- "Nobody ever asks me to play," said {friend}. "Nobody asks me either," said {hero}, and they both had to laugh.

- They played with {thing.the} until [noon|the sun went down|their cheeks were red].
- Soon they were running through the grass with {thing.the}, and neither of them was shy any more.

- But then {thing.the} landed {spot}, and they could not reach {thing.them}.
- All at once {thing.the} {thing.was} gone. They looked everywhere and found {thing.them} at last {spot}.

---

- {rival} and some others came to help, and after that they all {act2.past} together.
- The others heard them laugh. "May we join in?" asked {rival}. "Of course," said {hero}.

- <supper friend>

- "Well," asked {elder} in the evening, "did anybody like you?" {hero} [grinned|smiled]. "I have a friend," {hero.He}
  said.
- "Who was that?" asked {elder}. "That was {friend}," said {hero}. "Tomorrow we will {act.base}."

- <friends friend>
- And when somebody new came to the village, {hero} was the first to say hello.
=====
wish thing=magic snack=sweets

- <open> <pal friend> But {hero} was never quite content. "I wish I had more," {hero.He} always said.
- <open> <pal friend> But {hero} always wanted more than {hero.He} had.

- <oneday> {hero.he} helped {helper.intro} to carry a heavy [sack|basket|bundle]. "Take {thing.this}," said {helper}.
  "It grants three wishes. But think before you speak."
- <oneday> {hero} found {thing.a} {spot}. When {hero.He} rubbed it, {helper.intro} stood there. "You have three
  wishes," said {helper}. "Use them well."

---

- "I wish for {meal.noun}, all that I can eat!" cried {hero}.
- "I wish for a mountain of {snack.noun}!" cried {hero}.

- There was a flash, and the whole room was full, right up to {hero.his} [knees|chin], and still there was no end.
- At once there was food on the floor, on the table and on the bed, more and more, until {hero} could hardly move.

- "Stop!" cried {hero}, but nothing stopped. "I wish that {friend} were here to help me!"
- {hero.he} got a terrible stomach ache. "I wish that somebody would help me!" {hero.He} groaned.

- At once {friend} stood there and did not know what had happened. "What have you done?" {friend.He} asked.
- In that moment {friend} came through the window. "[What a mess|Good heavens]!" {friend.He} said.

- Now there was only one wish left. {hero} thought of [gold|a castle|a ship|a golden crown].
- "You have one wish left," said {friend}. "You could be [rich|famous|very strong]."

---

- But then {hero.he} looked at {friend}, who was up to {friend.His} neck in food. "I wish that everything were as it
  was before," said {hero}.
- {hero.he} thought for a long time. Then {hero.He} held {thing.the} tight. "I wish that all this would go to those
  who are hungry," {hero.He} said.

- There was another flash, and the room was empty. {thing.the} was gone too.
- {thing.the} shone once more and then turned into [a grey pebble|dust|a dry leaf].

- "Are you sad?" asked {friend}. "No," said {hero}. "I have a friend and {meal.a} for supper. What more could I wish
  for?"
- <supper friend>

- Somewhere {helper} [laughed softly|nodded]. "That was a wise wish," {helper.He} said.
- <later> {hero} met {helper} again. "Well?" {helper.He} asked. "I have enough," said {hero} and smiled.
- After that day {hero} never again said that {hero.He} wanted more.
=====
winter thing=ingredient snack=store season=winter

- <open> All autumn long {hero.he} had [worked|gathered food], and the cellar was full of {snack.noun} and
  {thing.noun}.
- <open> {hero.he} was careful and had stored {snack.a} and {thing.a} for the winter.

- {rival}, who lived next door, had only {act.done}. "Winter is far away," {rival.He} had said.
- The neighbor was {rival}, {rival.a}, who had {act.done} while the others worked.

---

- Then the snow came. It snowed for [three days|a whole week], until even the fences had disappeared.
- In {month} it became so cold that [the birds stopped singing|the well froze|the windows were white with frost].

- One evening there was a knock at the door. It was {rival}, thin and [pale|shivering]. "I have nothing left to eat,"
  {rival.He} said.
- One night {hero} heard somebody cry. It was {rival}, who sat {lair} and had not eaten for two days.

- {hero.he} looked at {hero.His} stores. Was there enough for two?
- "You should have worked when it was warm," thought {hero}. But {hero.He} saw how cold {rival} was.
- "There is only enough for one," said a small voice in {hero.his} head.

- <elder>
- Then {hero.he} thought of {elder}, who had never sent anybody away.

- "Come in," said {hero}. "Sit by the fire and have some {meal.noun}."
- {hero.he} opened the door wide. "What is enough for one is enough for two," {hero.He} said.

---

- So they shared {thing.the} and {snack.the}, and in the long evenings {rival} [told funny stories|sang old songs|made
  {hero.Him} laugh].
- All winter they lived together. {hero} made {meal.noun}, and {rival} [fetched the wood|swept the floor|kept the fire
  going].

- It was the shortest winter that {hero} could remember.
- The food became less and less, but with two of them it was never [dull|lonely].

- When spring came and the snow melted, {rival} was up before the sun. "[Now it is my turn to work|I will fill your
  cellar again]," {rival.He} said.
- In spring {rival} planted a garden that was twice as big as the old one. "Half of it is yours," {rival.He} told
  {hero}.

- And the next {season} there were two full cellars, and in both of them there {snack.was} {snack.a}.
- <thanks rival hero>
- <friends rival>
=====
firefly thing=glass season=summer

- <open> <pal friend>

- <oneevening> {hero} saw a tiny light {spot}. It was a firefly!
- On a warm evening in {month}, a firefly flew past {hero.his} nose and landed {spot}.

- {hero.he} caught it and put it into {thing.a}. "Now you are my lamp," {hero.He} said.
- "How beautiful you are!" said {hero}. {hero.He} fetched {thing.a} and put the firefly into it.

- {hero.he} showed {thing.the} to {friend}. "It is not happy in there," said {friend}.
- {friend} came to see it. "It shines so sadly," {friend.He} said.

---

- The next night the firefly shone less, and the night after that its light almost went out.
- But each night the little light grew [weaker|smaller]. {hero} gave it [leaves|dew|a drop of honey], but it did not
  help.

- "What is the matter with you?" asked {hero}. The firefly said nothing. It only looked out at the [stars|dark
  meadow].
- <elder> "It misses the other fireflies," said {elder}.

- <sad hero>
- {hero.he} wanted so much to keep it. {hero.he} thought about it the whole night.

- In the end {hero.he} opened {thing.the}. "Fly," {hero.He} whispered. The firefly rose and was gone.
- Then {hero} took {thing.the} outside and opened it. For a moment the firefly sat on {hero.His} {hero.hand}, and then
  it flew away.

---

- <later> {hero} and {friend} went {land.to} to {out.base}. They stayed too long, and it became so dark that they
  could not find the path.
- Some time later {hero} lost {hero.His} way {land.in}. There was no moon, and it was as dark as in {thing.one} with a
  lid on it.

- Suddenly a tiny light [danced|blinked] in the dark. Then there were two, then ten, then hundreds!
- "Look!" cried {hero}. A small light came closer and closer, and behind it came a hundred others.

- The fireflies lit up the whole path, past the {place2.noun} and right up to the door.
- One of them flew ahead, and the others made a bright road that led home.

- "That was my firefly," said {hero}. "It came back because I let it go," {hero.he} told {elder}.
- "Thank you, little lamp," said {hero}, and the firefly blinked [twice|three times].

- The empty {thing.noun} still stands on the window sill, and {hero} never closes it.
- Since then {hero} catches fireflies only with {hero.His} eyes.
? <night friend>
=====
ice thing=tool season=winter

- <open> {hero.his} best friend was {friend}, {friend.a}.

- <oneday> the two of them went to the frozen {water} to slide on the ice.
- In {month} the {water} was frozen, and {hero} and {friend} ran out to [slide|play] on the ice.

- "The ice is still thin in the middle," warned {elder}. "Stay near the bank."
- "Do not go too far out," called {helper.intro}, who was standing on the bank.

- {hero.he} stayed near the bank, but {friend} wanted to show what {friend.He} could do.
- For a while they were careful, but then {friend} slid farther and farther out.

---

- Crack! The ice broke, and {friend} fell into the cold water.
- There was a loud crack, and suddenly {friend} was gone. Only {friend.his} hat lay on the ice.

- "Help!" cried {friend}. {hero.his} first thought was to run to {friend.Him}, but {hero.He} remembered that the ice
  was thin.
- {hero.he} wanted to scream, but no sound came out.

- Then {hero} saw {thing.a} {spot}. {hero.He} lay down flat on the ice and pushed {thing.the} toward {friend}.
- {hero.he} ran to the bank and found {thing.a} {spot}. On {hero.His} belly {hero.He} crawled back over the ice.

- "Take hold of {thing.the}!" {hero.he} called. "I have got you!"
- {friend} caught {thing.the} with both {friend.hands} and held on.

- {hero.he} pulled with all {hero.His} might. The ice groaned, but {hero.He} did not let go.
- Bit by bit {hero} crept backward, and bit by bit {friend} came out of the water.

---

- At last they both lay on the bank, wet and out of breath.
- Soon they were safe on the bank, and {friend} shook like a leaf.

- {helper} wrapped them in blankets and brought {meal.a}.
- {elder} came running with blankets, and at home there {meal.was} {meal.a} and a hot bath.

- "You saved my life," said {friend}. "You would have done the same," said {hero}.
- <thanks friend hero>

- {friend} [had a cold for a week|sneezed all week], and {hero} brought {friend.Him} {snack.a} every day.
- "Why did you not run to {friend.Him}?" asked {elder}. "Because then we both would have fallen in," said {hero}. "I
  had to think first."

- The next time they waited until {elder} said that the ice was strong enough.
- {thing.the} hangs on the wall now, above the stove, and every guest hears the story.
=====
roof thing=tool thing2=patch season=spring,summer,autumn

- <open> {hero.he} would [much |]rather {act.base} than work.
- {hero.he} lived {region}. {hero.He} was {hero.a} who put off everything until tomorrow.

- There was a hole in the roof. "Mend it before the rain comes," said {elder}.
- The roof was old, and in one corner one could see the sky. "You should mend that," said {friend}, {friend.a} who
  lived nearby.

- "Tomorrow," said {hero}, and {act.past} instead.
- "There is no hurry," said {hero}. "The sun is shining." And {hero.he} went off to {act.base}.

- The next day {friend} asked again. "Tomorrow," said {hero} and yawned.
- On Monday it was too hot, on Tuesday {hero.he} wanted to {act2.base}, and on Wednesday {hero.He} forgot about it.

---

- Then the [wind turned|clouds came], and one night it began to rain. Drip, drop, drip, drop!
- In {month} there came a great storm. {hero} woke up because something wet fell on {hero.His} nose.

- Soon {hero.his} bed was wet, and so {thing3.was} {thing3.full} that {elder} had given {hero.Him}.
- {hero.he} put a bowl under the hole, and then a bucket, and then all the pots, but it was not enough.

- <sad hero>
- "If only I had listened!" said {hero}.

- In the middle of the night {hero} ran to {friend} and knocked. "Please help me," {hero.He} said.
- There was a knock. Outside stood {friend} with {thing.a}. "I thought that you might need me," {friend.He} said.

- "Come in and get dry first," said {friend}, "and tomorrow we will mend the roof."
- "I could say that I told you so," said {friend}, "but I will help you instead."
- {friend} did not laugh. {friend.He} fetched {thing.a} and {thing2.a}.

---

- <later> they climbed up with {thing.the}. {friend} held {thing2.the}, and {hero} hammered.
- They worked side by side with {thing.the} and {thing2.a}, and by noon the hole was gone.

- When the rain came back, not a single drop fell into the house.
- That night it rained again, but {hero} lay in bed and listened to it happily.

- Everything that had got wet was hung up to dry, and soon [the house was warm again|all was as before].
- <thanks hero friend>

- Now, when {elder} asks for something, {hero} no longer says "tomorrow." {hero.He} says "at once."
- And if {friend} needs help, {hero} is there before {friend.He} can ask.
- After that {hero} did the work first, and then {hero.He} {act.past} with a light heart.
"""
