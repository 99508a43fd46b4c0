"""Plots about danger, courage and help."""

from __future__ import annotations

__all__ = ["PLOTS"]

PLOTS = """
stuck thing=tool

- <open> <likes>

- <oneday> {hero.he} was on the way {place.to} when {hero.He} heard a [weak|sad|thin] cry.
- <oneday> {hero} {out.past} {land.in}. Suddenly {hero.he} heard somebody [crying|calling for help].

- {hero.he} followed the sound and found {creature.a} that was stuck [in the mud|in a fence|between two stones|in a
  thorn bush].
- It came from {creature.a}. One of its legs was caught [in a fence|under a fallen branch|between two stones].

---

- {hero.he} pulled as hard as {hero.He} could, but {creature.the} did not come free.
- "I will help you," said {hero}. But {hero.He} was too [small|weak], and {creature.the} was stuck too firmly.

- "Wait here," {hero.he} said. "I will [fetch help|be back soon]."
- {creature.the} looked at {hero.him} with [sad|big|dark] eyes. "I will not leave you," said {hero}.

- {hero.he} ran {place2.to}, where {helper.intro} was working.
- <meet>

- "Come quickly!" cried {hero}. "A% {creature.bare} needs our help!" {helper} took {thing.a} and came at once.
- {hero.he} told {helper.him} about {creature.the}. "We will need {thing.one}," said {helper}. "There is one {spot}."

- {hero.he} pulled, and {helper} pushed with {thing.the}. One, two, three!
- With {thing.the} they [lifted the weight|made the gap a little wider], and {hero} held {creature.the} gently.

---

- Then there was a jerk, and {creature.the} was free.
- At last {creature.the} slipped out and [shook itself|jumped up and down|fell into {hero.His} lap].

- It licked {hero.his} {hero.hand} and ran away into the [forest|grass|bushes].
- {hero.he} gave it {snack.a} and some water, and soon it could stand again.

- <thanks hero helper>

- Some weeks later {hero} lost {hero.His} way in the [fog|dark]. Suddenly {creature.a} stood there, and it led
  {hero.Him} home.
- In {month2} {hero} slipped and fell into a deep ditch. Nobody heard {hero.Him} but {creature.full}, and it ran and
  fetched {helper}.
- Years later {creature.the} still came to the door each {season}, and {hero} always had {snack.a} for it.

- "You helped me, just as I helped you," said {hero} and [smiled|stroked it].
- So a good deed always comes back.
- {hero.he} never forgot that day, and neither did {creature.the}.
=====
storm thing=rainwear season=spring,summer,autumn

- <open> <likes>

- <oneday> {hero.he} went {land.to} to {out.base}. "Take {thing.your} along," said {elder}, but {hero} did not listen.
- <oneday> {hero} set out for the {land.noun} to {out.base}. The sky was [blue|clear], so {hero.He} left {thing.the}
  at home.

- When {hero.he} was far from home, dark clouds came up over the {land2.noun}.
- Around noon the wind [rose|began to howl], and the sky turned [black|grey|yellow].

---

- Then came thunder and lightning, and the rain fell in [sheets|buckets|heavy drops].
- Soon it was raining so hard that {hero} could not see the path.

- {hero.he} hid {lair}, but it was wet there too.
- {hero.he} ran on, slipped and fell into a puddle. Now {hero.He} was [wet to the skin|cold and muddy].

- "If only I had taken {thing.the}!" thought {hero}.
- "Why did I not listen to {elder}?" thought {hero}.
? <sad hero>

- Then {hero.he} saw a light. It came from the home of {helper.intro}.
- "Over here!" somebody called. It was {helper.intro}, who was standing in a doorway.

- {hero.he} knocked, and the door opened. "Come in, come in," said {helper}. "You will catch a cold."
- "May I stay until the storm is over?" asked {hero}. "Of course," said {helper}.

---

- {helper} gave {hero.him} a blanket and {meal.a}, and they sat by the fire.
- There was a fire in the stove, and on the stove stood {meal.a}. {hero} ate and [felt warm again|stopped shivering].

- While the thunder [rolled|rumbled] outside, {helper} told a story about [a giant|a lost ship|a clever fish|the
  moon].
- They played [cards|checkers|dice] while the rain drummed on the roof, and {hero} forgot the storm.

- At last the rain stopped, and a rainbow stood over the {land2.noun}.
- In the evening the clouds [broke|drifted away], and the sun shone on the wet [grass|leaves|stones].

- {helper} took {hero} home, where {elder} was waiting at the gate with {thing.full} in {elder.his} {elder.hands}.
- <thanks hero helper>
- {elder} [hugged {hero.Him}|was not angry]. "Next time I will listen to you," said {hero}.

- <later> {hero} brought {helper} {snack.a}, and {hero.He} was wearing {thing.full}, although the sun was shining.
- Since that day {hero} looks at the sky before {hero.He} goes out.
? <friends helper>
=====
afraid thing=light

- <open> <pal friend>

? <likes>

- {hero.he} had a secret. {hero.He} was afraid of the {fear}.
- There was only one thing that {hero.he} was afraid of, and that was the {fear}.

- When the others went to see the {fear}, {hero} always [stayed at home|had a cough|found an excuse].
- {rival} often laughed at {hero.Him}. "Scaredy-cat!" {rival.He} called.

---

- <oneday> {friend} did not come home. "I saw {friend.Him} near the {fear}," said {rival}.
- <oneday> {friend} went to the {fear} and did not come back.

- It was getting dark, and there was nobody who could help. {elder} was away, and {rival} [did not dare to go|had run
  home].
- "Somebody has to look for {friend.Him}," said {elder}, "but my legs are too old."

- {hero.his} knees shook. But {hero.He} took {thing.a} and went.
- {hero.he} thought of {friend} and forgot to be afraid. {hero.He} picked up {thing.a} and ran.

- <elder>
- "One step," {hero.he} said to {hero.Himself}, "and then one more."
- The wind [howled|whistled], and the shadows looked like [wolves|giants|long arms].

- "Is anybody there?" called {hero}. A voice answered, very far away. "Here! I am here!"
- In the light of {thing.the} {hero} saw a [shoe|hat|footprint] of {friend}.

---

- {hero.he} went into the {fear}, and there, {nook}, {hero.He} found {friend}, who had hurt {friend.His} [foot|knee].
- And there sat {friend}, {nook}, [cold|pale] and all alone. "I knew that you would come," {friend.He} said.

- "Lean on me," said {hero}. "{thing.the} will show us the way."
- {hero.he} helped {friend.him} up, and together they went back, step by step.

- On the way they sang, so that the dark seemed less dark.
- Behind them the {fear} lay quiet in the moonlight. It was [not terrible at all|almost beautiful].

- When they came home, everybody cheered, and {rival} looked at the ground. "You are braver than I am," {rival.He}
  said.
- {rival} was waiting at the gate. "I am sorry that I laughed," {rival.He} said.

- "Were you not afraid?" asked {elder}. "Yes," said {hero}, "but {friend} needed me."
- "You can be afraid," said {elder}, "and still be brave."
- <thanks friend hero>
=====
race

- <open> {hero.he} had one great wish. {hero.He} wanted to win the race {place.to}.
- Every year in {month} there was a race {place.to}. {hero}, {hero.a}, wanted to be in it for the first time.

? <pal friend>

- But there was also {rival}, {rival.a}, who had won [three times|every race so far].
- "You will never beat me," said {rival}, who was {rival.a}. "You are much too slow."

- So {hero} trained [every morning|every day], and {elder} [counted the minutes|cheered].
- {friend} helped {hero.him} to train. Each morning they ran up the hill and down again, and then they ate {snack.a}.

---

- On the day of the race [the sun was shining|the wind was blowing|the sky was grey]. All the neighbors stood along
  the road and [waved|clapped].
- Then the great day came. "Ready, steady, go!" cried {elder}.

- {rival} shot off like an arrow, and soon {hero.he} saw only dust.
- {rival} took the lead, but {hero} was close behind.

- They ran past the {place2.noun} and over the bridge. {hero.his} legs hurt, but {hero.He} did not stop.
- Halfway {hero} came closer and closer. {hero.He} could already hear {rival} breathe.

- Then, at the last bend, {rival} slipped and fell into [the ditch|the mud|the brook]. "Ow! My foot!" {rival.He}
  cried.
- Suddenly a cry came from the side of the road. {rival} lay in the grass and could not get up.

- {hero.he} could have won now. But {hero.He} stopped.
- The finish was near, and nobody was in front of {hero}. Still, {hero.He} turned around.

---

- "Put your arm around me," said {hero}. Side by side they [limped|walked] to the finish, and they were the last of
  all.
- {hero.he} helped {rival.him} up. Meanwhile all the others ran past them, and {friend} came first.

- But the crowd cheered louder for {hero} than for the winner.
- {rival} could hardly believe it. "You could have won," {rival.He} said. "Why did you stop?" "Because you were hurt,"
  said {hero}.

- The mayor gave {hero.him} a [medal|ribbon] too. "For the [biggest|kindest] heart," it said.
- {elder} was waiting with {meal.a}. "I have never been so proud," {elder.He} said.

- "Next year," said {rival}, "we will train together." And so they did.
- <friends rival>
- <thanks rival hero>
"""
