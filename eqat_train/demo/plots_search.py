"""Plots about losing, seeking, bringing and finding."""

from __future__ import annotations

__all__ = ["PLOTS"]

PLOTS = """
lost thing=metal,cloth,toy

- <open> <likes>

- {hero.his} dearest treasure was {thing.a} that {elder} had [made|bought|found] for {hero.Him}.
- {elder} had given {hero} {thing.a}, and {hero.he} [took {thing.them} everywhere|never went out without
  {thing.them}].
- Of all the things that {hero.he} owned, {hero.he} loved {thing.full} best, because {thing.it} had once belonged to
  {elder}.
- For {hero.his} birthday {elder} had given {hero.him} {thing.a}.

---

- <oneday> {hero.he} went {land.to} to {out.base}. When {hero.He} came home, {thing.the} {thing.was} gone.
- <oneday> {hero.he} woke up and saw that {thing.full} {thing.was} [missing|not there].
- <oneday> {hero} {out.past} {land.in}, and only in the evening did {hero.He} notice that {thing.the} {thing.was}
  missing.

- {hero.he} looked {spot2} and {spot3}, but {thing.the} {thing.was} not there.
- First {hero.he} searched {spot2}. Then {hero.He} searched {spot3}. There was [no trace of {thing.the}|nothing but
  dust].
- {hero.he} turned the whole house upside down and even looked {spot2}, but {hero.He} found only [an old sock|a
  spider|a broken cup].

? <sad hero>

- <meet> <ask>

- "I have lost {thing.my}," said {hero}. "{elder} gave {thing.them} to me[, and now {thing.it} {thing.is} gone|]."
- "I cannot find {thing.my}," said {hero}. "Have you seen {thing.them}?"
- "{thing.my} {thing.is} gone," {hero} [sobbed|answered|said]. "I have looked everywhere."

- {helper} thought for a while. "When the wind blew last night, I saw something {thing.adj} {spot}," {helper.He} said.
- "Wait," said {helper}. "I saw [a magpie|a crow|a puppy] with something {thing.adj}. It ran away and hid {spot}."
- "Go back the way you came," said {helper}, "and look {spot}. Lost things like to hide there."

---

? <walk hero helper>

- And there, {spot}, {thing.was} {thing.full}!
- They looked {spot}, and there {thing.it} {thing.was}, a little [dusty|wet|muddy], but [whole|safe].
- At first they saw nothing. Then {helper} pointed, and {spot} {hero} saw {thing.full}.

- <glad hero>

- <thanks hero helper>

- {hero.he} sewed a [deep|strong] pocket into {hero.His} coat, so that {thing.the} could never get lost again.
- Now {hero} keeps {thing.the} in a box [by the bed|with a lock], and {hero.He} knows that [one should ask for
  help|friends see more than one alone].
- From then on {hero} took good care of {thing.the}, and whenever {hero.He} looked at {thing.them}, {hero.He} thought
  of {helper}.

? <friends helper>
=====
noise thing=light

- <open>

- {hero.he} was not afraid of anything, or so {hero.He} [said|thought].
- <likes>
- {elder} slept in the next room and snored like [a bear|a sawmill|an old engine].

---

- One {day} night in {month} a strange noise woke {hero}. [Scratch, scratch!|Tap, tap, tap!|Crunch, crunch!|Squeak!]
- One {season} night {hero} heard a strange noise. [Scratch, scratch!|Tap, tap, tap!|Crunch, crunch!|Squeak!]

- "Is it a [ghost|giant|monster|thief]?" {hero.He} whispered. {hero.his} heart beat [fast|like a drum].
- {hero.he} pulled the blanket over {hero.His} head, but the noise did not stop.
- "There it is again," thought {hero}. "It comes from outside."

- {hero.he} woke {elder}, but {elder} only said, "It is the wind. Go back to sleep."
- {elder} did not wake up, so {hero} had to go alone.
? <elder>

- At last {hero.he} lit {thing.a} and went to look.
- Then {hero.he} took {thing.full} from the shelf and opened the door very slowly.
- {hero.he} picked up {thing.full}, took a deep breath and tiptoed outside.

- {hero.he} looked {spot2}. Nothing. {hero.he} looked {spot3}. Nothing.
- The light of {thing.the} danced on the walls, and every shadow looked like [a monster|a wolf|a giant].

---

- Then {hero.he} looked {lair}, and two [round|bright|frightened] eyes looked back. It was {creature.a}!
- There, {lair}, sat {creature.a} that was [shivering with cold|looking for something to eat|even more afraid than
  {hero}].

- "So you made all that noise!" said {hero} and laughed. "You must be hungry."
- "Do not be afraid," said {hero} softly. "I will not hurt you."
- "You poor thing," said {hero}. "[You are lost|You are cold], are you not?"

- {hero.he} [gave {creature.the} {snack.a}|fetched {snack.a} for {creature.the}], and {creature.the} ate [every
  crumb|until nothing was left].
- {hero.he} brought {snack.a}, and {creature.the} ate from {hero.His} {hero.hand}. Soon it [fell asleep|was not afraid
  any more|closed its eyes].

- <later> {elder} found {hero} and {creature.the} asleep side by side, with {thing.the} beside them.
- <later> {hero} showed {creature.the} to {elder}. "So it was not the wind after all," said {elder} with a smile.

- After that night {hero} was never afraid of strange noises again, because it might be a friend who was knocking.
- {creature.the} stayed, and whenever something scratched in the night, {hero} only [smiled|turned over] and slept on.
- {hero.he} called {creature.the} {petname}, and {petname} slept at the foot of {hero.His} bed every night.
=====
delivery thing=cloth

- {hero.intro} lived in {hero.home} {region}.
- Once upon a time there was {hero.intro} who lived {region}.
- {region} lived {hero.intro}.
- {hero.he} was {hero.a}, and {hero.his} home was {hero.home} {region}.

? <likes>

- {elder}, who lived on the other side of the {land.noun}, was ill and had to stay in bed.
- {elder} lived far away, beyond the {land.noun}, and <elder_waits>.

- <oneday> {hero} [packed|baked] {meal.a}. "I will bring {meal.them} to {elder}," {hero.He} said.
- <oneday> {hero} decided to take {meal.a} to {elder}, because {meal.it} would make {elder.Him} strong again.

- "Do not stop on the way," said {friend}, who was {hero.his} neighbor. "[A storm is coming|It gets dark early]."
? {hero} wore {thing.full} that {elder} had made.

---

- But when {hero.he} came to the {water}, the bridge was [broken|gone]. The water was [deep|wild] and [cold|fast].
- Halfway there {hero.he} found that a [great tree|heap of stones] had fallen across the road, and nobody could get
  past.
- {hero.he} had not gone far when a thick fog came up. Soon {hero.He} could not see {hero.His} own {hero.hands}.

- <sad hero>
- "I must not turn back," {hero} said. "{elder} is waiting for {meal.the}."
- <elder>

- <meet>

- "I must take {meal.this} {meal.noun} to {elder}, but I cannot go on," said {hero}.
- <ask> {hero} told {helper.Him} about {elder} and {meal.the}.

- "I know another way," said {helper}. "It goes {spot} and then over the hill. Hold on to me."
- "[Nothing is easier|Do not worry]," said {helper}. "I know every stone here. Follow me, and stay close."
- {helper} smiled. "Your {elder.kind} once helped me when I was [ill|hungry|lost]. Now I will help you. Come!"

- <walk hero helper>
- They went slowly, {hero.hand} in {helper.hand}, and {helper} tested every step.

---

- At last they saw a light. It was the window of {elder}.
- When the sun went down, {hero} knocked at {elder.his} door.

- "{hero}!" cried {elder}. "You came all this way, and you brought {meal.a}!"
- {elder} sat up in bed and [smiled|laughed]. "{meal.the} {meal.verb:smell} [wonderful|of home]," {elder.He} said.

- They ate {meal.the} together, and {elder} [felt better at once|had red cheeks again|told them stories].
- {helper} had to eat with them, of course, and there {meal.was} enough {meal.noun} for three.

- <later> {elder} was [well again|out of bed], and people say that it was {meal.the} that cured {elder.him}.
- <thanks hero helper>
- "The best medicine," said {elder}, "is somebody who comes to see you."

? <friends helper>
=====
map thing=treasure

- <open> {hero.his} best friend was {friend}, {friend.a}.
- {hero}, {hero.a}, and {friend}, {friend.a}, lived {region} and did everything together.

- <oneday> they found an old map {spot2}.
- <oneday> {friend} pulled a dusty bottle out of the [sand|mud|river]. There was a map inside.
- <oneday> an old map fell out of a book that had belonged to {elder}.

- A red cross marked a spot near the {land.noun}. "[A treasure|Gold and silver]!" [cried|whispered] {friend}.
- "Look at the cross!" said {hero}. "It is close to the {land.noun}. Let us go at once."

---

- "[Begin|Start] {place2.in}," the map said, "and walk [twenty|thirty|forty|fifty|a hundred] steps toward the
  [rising|setting] sun."
- The first clue led them {place2.to}, and the second clue was carved into a [tree|stone].

- They walked and counted, but {friend} stumbled and forgot the number, so they had to begin again.
- The steps ended {dig2}, where they found nothing but [mud|moss|nettles].
- It began to rain, and the ink on the map ran. Only one word could still be read.

- "We will never find it," [sighed|said] {friend}. {hero} shook {hero.His} head. "Let us [try once more|look at the
  map again]."
- "Let us go home," said {friend}, but {hero} did not want to give up.
- They were about to turn back when they met {helper.intro}. "You are holding the map upside down," {helper.He} said
  and laughed.

- Then {hero} saw a mark on a stone that looked just like the cross on the map.
- Then {friend} noticed that the old tree on the map had [fallen down|two trunks], and everything became clear.

---

- They dug {dig} until {friend} hit something hard. It was [an iron|a wooden|a painted] chest!
- The chest stood {dig}, covered with [leaves|moss|sand]. Together they lifted the lid.

- There was no gold in it. There {thing.was} only {thing.a}, and a note: "[Share this with a friend|For whoever finds
  it]."
- Inside {thing.was} {thing.a} that {elder} had buried as a child.

- At first they were disappointed, but then {hero} [took {thing.the} out|looked more closely], and they forgot the
  gold.
- "{thing.this} {thing.is} better than gold," said {hero}, and {friend} [agreed|nodded].

- They brought {thing.the} to {elder}, who [wept with joy|laughed for a long time|had to sit down]. "I hid
  {thing.them} when I was as small as you," {elder.He} said.
- All through the {season} they shared {thing.the}, and every evening they [sat together|met] {land.in}.
- They took {thing.the} home and showed {thing.them} to everyone, and {elder} told them the story of the map.

- And the map? {hero} put it back {spot2}, so that someone else could find it one day.
- The greatest treasure, {hero} thought, was the day that {hero.He} had spent with {friend}.
- <friends friend>
=====
little_one thing=toy,cloth

- <open> {hero.he} had a little [brother|cousin] whose name was {boy}.

- {boy} was very small and very quick, and he took {thing.full} wherever he went.
- {boy} was only [three|four] years old, and he loved {thing.full} more than anything.

- <oneday> {elder} said, "Take {boy} {place.to}, {hero}, but do not let go of him."
- <oneday> {hero} took {boy} {place.to}, where there was a [fair|feast|puppet show].

---

- There was so much to see that {hero} looked away for a moment. When {hero.He} turned around, {boy} was gone.
- While {hero} stopped to [look at the toys|watch a juggler|listen to a fiddler|buy {snack.a}], {boy} slipped away.

- "{boy}! Where are you?" {hero} called. There was no answer.
- {hero.he} ran up and down and asked everybody, but nobody had seen the boy.

- <sad hero>

- <meet> "I saw a small boy," said {helper}. "He went that way, and he was holding {thing.a}."
- <meet> <ask> "{boy} is lost," said {hero}. "Then we will look for him together," said {helper}.

- On the ground {hero} saw small footprints. They led {place2.to}.
- {hero.he} found [crumbs|a tiny shoe|a trail of petals] on the path. "He must have come this way!"

- They looked {spot2} and {spot3}. {helper} called, and {hero} listened.
- The footprints ended at a [puddle|ditch|stone wall], and it was getting dark.

---

- Then {hero} saw something {thing.adj}. It was {thing.the}! And there, {lair}, lay {boy}, fast asleep.
- At last they found {boy} {lair}. He was asleep, with {thing.full} in his arms.

- "I was not lost," said {boy} when he woke up. "I was here all the time."
- {boy} opened his eyes. "I was looking for you, {hero}," he said. "Where have you been?"
- {boy} yawned and asked whether there was anything to eat.

- {hero} [laughed|cried] with relief and carried him home on {hero.His} back.
- {hero.he} lifted {boy} up and held him tight, and they went home together.

- <thanks hero helper>
- <supper helper>

- From then on {hero} held the hand of {boy} whenever they went out, and {boy} held {thing.the}.
- {hero.he} never told {elder} how long {hero.He} had searched, but {elder} knew it all the same.
- "You did not give up," said {elder}. "That is what counts."
=====
thief

- <open> {hero.his} neighbor was {rival}, {rival.a} whom nobody [trusted|knew well].

- <pal friend>

- <oneday> {hero} made {meal.a} and put {meal.them} on the window sill to cool.
- <oneday> {elder} baked {meal.a} and left {meal.them} on the table by the open window.

- When {hero.he} came back, {meal.the} {meal.was} gone!
- A little later {hero} wanted to taste {meal.the}, but the plate was empty.

---

- "It was {rival}!" said {friend}. "[I saw {rival.him} near the house|{rival.He} is always hungry]."
- "Only {rival} could have done that," [said|whispered] {friend}, and {hero} believed it.

- Angrily they went to {rival}. "Give back {meal.the}!" cried {hero}. "But I did not take {meal.them}," said {rival},
  and {rival.his} eyes filled with tears.
- {hero.he} did not greet {rival} any more, and {rival} did not know why.

- <later> {hero} made more {meal.noun} and hid {lair} to keep watch.
- "Let us set a trap," said {friend}. They put out more {meal.noun}, hid {lair}, and waited.

- They waited for an hour. Then they heard a [rustle|soft patter].
- The clock struck [ten|eleven|midnight]. Something moved [by the window|in the dark].

---

- It was not {rival}. It was {creature.a}, thin and hungry, and it pulled {meal.the} away with its [teeth|mouth]!
- Out of the dark came {creature.a} with three little ones behind it. They were the thieves!

- {hero.he} felt ashamed. "We blamed {rival} for nothing," {hero.He} said.
- "Oh dear," said {friend}. "I was so sure that it was {rival}."

- <later> {hero} went to {rival} with {snack.a}. "I am sorry," {hero.He} said. "I was wrong about you."
- At once {hero} ran to {rival} and asked {rival.him} to forgive {hero.Him}.

- {rival} was quiet for a moment. Then {rival.He} [smiled|laughed]. "It is all right," {rival.He} said. "Shall we feed
  {creature.the} together?"
- "I know how it feels to be hungry," said {rival}. "Let us give {creature.the} something to eat."

- So they [put out|shared] {snack.a} for {creature.the} every evening, and no more {meal.noun} {meal.was} stolen.
- They built a small house {dig} for {creature.the}, and it never had to steal again.

- Since then {hero} never says that somebody did something bad unless {hero.He} knows it.
- <friends rival>
"""
