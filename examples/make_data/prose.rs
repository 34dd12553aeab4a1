//! Texts that are not dialogues: stories, diaries, letters, descriptions.

use crate::dice::Dice;
use crate::grammar::{Scene, capital, counted, joined, plural, tidy};
use crate::words::{self, spelled};
use crate::world::{self, Person, cast, code, date, digits, figure, time, town};

/// A kind of text: how often it should occur, and how it is written.
type Kind = (usize, fn(&mut Dice) -> String);

/// Any one text, by how often its kind should occur.
pub(crate) fn any(dice: &mut Dice) -> String {
    const KINDS: &[Kind] = &[
        (30, story),
        (12, counting),
        (8, swaps),
        (10, diary),
        (5, forecast),
        (10, stock),
        (10, letter),
        (6, recipe),
        (7, gazetteer),
        (7, portrait),
        (6, notices),
        (6, register),
        (5, table),
        (34, crate::essays::essay),
    ];
    let weights: Vec<usize> = KINDS.iter().map(|kind| kind.0).collect();
    KINDS[dice.weighted(&weights)].1(dice)
}

/// One sentence from each of `steps`.
fn tell(scene: &Scene, dice: &mut Dice, steps: &[&[&str]]) -> Vec<String> {
    steps.iter().map(|step| scene.one(dice, step)).collect()
}

/// `sentences` in paragraphs of two to five.
fn paragraphs(dice: &mut Dice, sentences: &[String]) -> String {
    let mut rest = sentences;
    let mut out = Vec::new();
    while !rest.is_empty() {
        let (now, later) = rest.split_at(dice.between(2, 5).min(rest.len()));
        out.push(now.join(" "));
        rest = later;
    }
    out.join("\n\n")
}

/// A noun phrase for something: "old red kettle".
fn object(dice: &mut Dice, thing: &str) -> String {
    let mut scene = Scene::default();
    scene.set("it", thing);
    scene.raw(
        dice,
        "[{look} ||{look} {colour} |{colour} |{material} |{look} {material} ]{it}",
    )
}

/// Two kinds of things: "kettles and lamps".
fn wares(dice: &mut Dice) -> String {
    let things: Vec<String> = dice
        .sample(words::THINGS, 2)
        .into_iter()
        .map(plural)
        .collect();
    joined(&things)
}

const INTERLUDES: &[&str] = &[
    "Outside, {weather}.",
    "That day {weather}, and {n1} [hardly noticed|was glad of it|thought of {his1} {kin}].",
    "{n1} felt {feeling}, but {he1} [went on|said nothing|did not give up|tried to smile].",
    "{he1} remembered what {his1} {kin} used to say: {saying}.",
    "[Somewhere|Far away|In the distance] {a animal} [called|could be heard|answered another one].",
    "{he1} sat down [for a moment|on a stone|on the steps] and [ate a piece of bread|listened|drank some water|looked at the sky], {because}.",
    "In {home}, people [said|believed|often told each other] that {saying}.",
    "\"[Are you all right|Do you need help|Is it much farther]?\" asked {a nature} {job} who came past. \"[I think so|Perhaps a little|Thank you, yes],\" said {n1}.",
    "Nobody in {home} had ever seen {a nature} {animal} like the one that [sat|stood] [by the road|on the wall] and watched.",
    "The {animal} that lived near {place} [looked up|ran away|came closer] when {he1} passed.",
];

/// A story in one of several plots.
fn story(dice: &mut Dice) -> String {
    tale(dice, None, None)
}

/// A story about `hero` and about `thing`, or about anyone and anything.
pub(crate) fn tale(dice: &mut Dice, hero: Option<&Person>, thing: Option<&str>) -> String {
    let mut scene = Scene::default();
    let mut people: Vec<Person> = hero.into_iter().cloned().collect();
    Person::join(dice, &mut people, 3);
    world::bind(&people, &mut scene);
    scene.set("home", town(dice));
    scene.set("away", town(dice));
    let thing = thing.unwrap_or_else(|| dice.pick(words::THINGS)).to_owned();
    scene.set("obj", object(dice, &thing));
    scene.set("it", thing);
    scene.draw(dice, "nat1", "nature");
    scene.draw(dice, "nat2", "nature");
    scene.draw(dice, "job1", "job");
    scene.draw(dice, "job2", "job");
    scene.draw(dice, "kin1", "kin");
    scene.draw(dice, "beast", "animal");
    scene.draw(dice, "meal", "dish");
    let places = dice.sample(words::list("place"), 3);
    for (at, place) in places.into_iter().enumerate() {
        scene.set(&format!("place{}", at + 1), place);
    }
    scene.set("day1", dice.pick(words::list("day")));

    let mut sentences = vec![scene.one(
        dice,
        &[
            "[Once|Long ago|Some years ago|Once upon a time], there lived {a nat1} {boy1} called {n1} in the [town|village|little town] of {home}.",
            "{n1} was {a nat1} {job1} [from|who lived in] {home}.",
            "In {home}, [near|not far from|right beside] {place1}, lived {a nat1} {job1} whose name was {n1}.",
            "[Everyone|Nearly everybody|Every child] in {home} knew {n1}, the {nat1} {job1}.",
            "On {a season} [morning|day|evening], {n1} [stood at the window|walked through {home}|sat in front of {place1}] and felt {feeling}.",
            "This is the story of {n1}, {a nat1} {boy1} from {home}, and of {a obj}.",
        ],
    )];
    let plots: &[fn(&mut Scene, &mut Dice) -> Vec<String>] = &[
        lost, journey, making, rescue, contest, mystery, gift, stranger,
    ];
    let plot = dice.choose(plots);
    sentences.extend(plot(&mut scene, dice));
    for _ in 0..dice.below(3) {
        let at = dice.between(2, sentences.len() - 1);
        let line = scene.one(dice, INTERLUDES);
        if !sentences.contains(&line) {
            sentences.insert(at, line);
        }
    }
    sentences.push(scene.one(
        dice,
        &[
            "From that day on, {n1} and {n2} were [good|the best of] friends.",
            "{n1} went home and [slept well|told {his1} {kin1} everything|felt {good feeling}].",
            "And if {he1} has not moved away, {n1} still lives in {home} [today|with {his1} {beast}|and tells this story].",
            "That night {n1} [lay awake|sat by the fire] for a long time and was {good feeling}.",
            "So {n1} learned that {saying}.",
            "\"[You see|Well|As they say],\" said {n2}, \"{saying}.\" And {n1} [laughed|agreed|nodded].",
            "The {it} still [hangs|stands|lies] in {his1} {room}, and {n1} looks at it whenever {he1} feels {feeling}.",
        ],
    ));
    paragraphs(dice, &sentences)
}

fn lost(scene: &mut Scene, dice: &mut Dice) -> Vec<String> {
    scene.draw(dice, "where", "spot");
    tell(
        scene,
        dice,
        &[
            &[
                "{he1} owned {a obj}, which had belonged to {his1} {kin1}, and {he1} [took it everywhere|would not have sold it for anything|looked after it well].",
                "Nothing was dearer to {him1} than {a obj} that {his1} {kin1} had given {him1}.",
                "{his1} {kin1} had left {him1} {a obj}, and it stood {where} for everyone to see.",
            ],
            &[
                "One {season} morning the {it} was gone.",
                "But on {day1}, when {n1} came back from {place1}, the {it} was [no longer there|gone].",
                "Then, one evening, {he1} could not find the {it} anywhere.",
            ],
            &[
                "{n1} looked in the {room}, in the {room} and even behind {place1}, but {he1} found nothing [except {a thing}|but dust|at all].",
                "{he1} searched the whole house {manner}, and then {he1} searched it again.",
                "{he1} asked the {job2}, who had seen nothing, and the {job}, who [only shook his head|had not slept all night].",
            ],
            &[
                "\"Have you seen my {it}?\" {he1} asked {n2}, who was [sitting in front of|sweeping the floor of|coming out of] {place2}.",
                "At {place2} {he1} met {n2}. \"I have lost my {it},\" {he1} said {manner}.",
                "In the end {he1} went to {n2}, {a nat2} {job2}, who was known for finding things.",
            ],
            &[
                "\"Where did you have it last?\" asked {n2}. {n1} thought about it {manner}. \"At {place3},\" {he1} said.",
                "{n2} [thought for a while|scratched {his2} head] and said, \"When did you last go to {place3}?\"",
                "\"I saw {a beast} run past with something [shiny|strange] in its mouth,\" said {n2}, \"and it ran towards {place3}.\"",
            ],
            &[
                "So the two of them went to {place3} together, {because}.",
                "Together {n1} and {n2} walked to {place3}, while {weather}.",
                "They [took a lantern|packed some bread|put on their coats] and set out for {place3}.",
            ],
            &[
                "There, [under a pile of leaves|between two stones|behind an old wall|beside {a beast} that was fast asleep], lay the {it}.",
                "And there it was: the {it}, [a little wet|covered with dust], but [whole|not broken].",
                "At first they saw only {a beast}, but when it moved away, they saw the {it} lying on the ground.",
            ],
            &[
                "\"How can I thank you?\" asked {n1}. \"[Cook me some {meal}|Lend me the {it} on {day}|Teach me your song],\" said {n2}.",
                "{n1} was so {feeling} that {he1} [forgot to say thank you|gave {n2} a {colour} {thing}|began to sing].",
                "{n1} thanked {n2} and gave {him2} {a thing} for {his2} trouble.",
            ],
        ],
    )
}

fn journey(scene: &mut Scene, dice: &mut Dice) -> Vec<String> {
    tell(
        scene,
        dice,
        &[
            &[
                "One day {his1} {kin1} asked {him1} to bring {a obj} to {n2}, who lived in {away}.",
                "On {day1} a letter came from {away}: {n2}, {a nat2} {job2}, [needed|was waiting for] {a obj}.",
                "{he1} had promised to carry {a obj} to {n2} in {away}, and a promise is a promise.",
            ],
            &[
                "{n1} [wrapped the {it} in a blanket|put the {it} into a bag|tied the {it} to {his1} back] and left at {clock}.",
                "So {he1} packed [bread and cheese|some {meal}|{a thing}] for the road, took the {it} and [set out|left {home}] {manner}.",
            ],
            &[
                "The road went past {place1} and {place2}, and {weather}.",
                "First {he1} walked to {place1}, and then along the river to {place2}.",
                "Until noon the road was easy, but then {weather}.",
            ],
            &[
                "At {place2} the bridge was [broken|closed|under water], and {n1} did not know what to do.",
                "Near {place2} {he1} lost {his1} way, {because}.",
                "Behind {place2} {a beast} stood in the middle of the road and would not move.",
            ],
            &[
                "\"[Wait|Stop|Not that way]!\" called somebody. It was {n3}, {a nature} {job} who knew every path.",
                "Luckily {n3}, {a job} from {away}, came along with a [cart|boat|mule].",
                "There {he1} met {n3}, who was also going to {away}, and they went on together.",
            ],
            &[
                "{n3} showed {him1} [a path through the trees|an old boat|a safe way across], and {n1} gave {him3} half of {his1} bread.",
                "\"Follow me,\" said {n3}, and {he3} led {n1} [around the hill|through the water|past the ruins] {manner}.",
                "They talked about {hobby} and about {hobby}, and the way seemed short.",
            ],
            &[
                "When they reached {away} at last, {n2} was standing in front of {place3}.",
                "At {clock} {he1} knocked at the door of {n2}, and {he2} opened {manner}.",
                "In {away}, {n2} had been waiting since {clock}.",
            ],
            &[
                "\"My {it}!\" cried {n2}. \"You have brought it all the way from {home}!\"",
                "{n2} took the {it}, looked at it {manner} and said, \"This is [better|finer|lighter] than I had hoped.\"",
                "{n2} was so {feeling} about the {it} that {he2} invited {n1} and {n3} to {meal}.",
            ],
        ],
    )
}

fn making(scene: &mut Scene, dice: &mut Dice) -> Vec<String> {
    scene.draw(dice, "stuff", "material");
    scene.draw(dice, "aid", "tool");
    tell(
        scene,
        dice,
        &[
            &[
                "For the [summer|spring|harvest|winter] feast, {n1} wanted to make {a it} out of {stuff}.",
                "{he1} had always wanted {a it} of {stuff}, but there was none to be had in {home}.",
                "\"I will make {a it} for my {kin1},\" {n1} said to {himself1}.",
            ],
            &[
                "{he1} borrowed {a aid} from {n2} and [began to work|went to work] {manner}.",
                "First {he1} needed {a aid}, and the only good one belonged to {n2}, the {job2}.",
                "In {place1} {he1} found enough {stuff}, and {n2} lent {him1} {a aid}.",
            ],
            &[
                "The first {it} was too [heavy|thin|crooked|small], and the second one broke.",
                "After two days the {it} looked [more like {a thing} than like {a it}|crooked and sad].",
                "{he1} worked all of {day1}, {because}, but the {stuff} [broke|would not bend|was too hard].",
            ],
            &[
                "\"{stuff} needs time,\" said {n2}. \"You must [wait|work slowly|use less of it].\"",
                "{n2} looked at it and said, \"You are holding the {aid} the wrong way round.\"",
                "\"Shall I show you?\" asked {n2}, who had once been {a job}.",
            ],
            &[
                "So {n1} started again, and this time {he1} worked {manner}.",
                "Then the two of them worked together, {n1} with the {aid} and {n2} with {a tool}.",
                "{n1} took a deep breath, picked up the {aid} and tried once more.",
            ],
            &[
                "By {clock} the {it} was ready: {look}, {look} and made of nothing but {stuff}.",
                "When the {it} was done at last, {he1} painted it {colour}.",
                "On the day of the feast everybody came to {place2} to see the {look} {it}.",
            ],
            &[
                "\"Who made this?\" asked {n3}. \"I did,\" said {n1}, \"and {n2} helped me.\"",
                "{n3} wanted to buy it, but {n1} [shook {his1} head|said no|would not sell it].",
                "Even {n3}, who was never pleased, said that it was the best {it} in {home}.",
            ],
        ],
    )
}

fn rescue(scene: &mut Scene, dice: &mut Dice) -> Vec<String> {
    tell(
        scene,
        dice,
        &[
            &[
                "One {season} evening {he1} found a [young|small|hurt|hungry] {beast} near {place1}.",
                "On the way to {place1}, {n1} heard a [small|thin|strange] sound. It was a young {beast}.",
                "When {weather}, a {colour} {beast} came to {his1} door.",
            ],
            &[
                "The {beast} could not [walk|stand|eat], and it looked at {n1} {manner}.",
                "It was cold and wet and too weak to run away.",
                "One of its legs was hurt, and it shook all over.",
            ],
            &[
                "{n1} wrapped it in {a thing} and carried it home {manner}.",
                "{he1} put the {beast} into {a thing} full of straw and set it beside the fire.",
                "{he1} did not know much about animals, so {he1} ran to {n2}, the {job2}.",
            ],
            &[
                "{n2} said, \"Give it water first, and a little {fruit} later.\"",
                "\"It will live,\" said {n2}, \"but you must keep it warm until {day1}.\"",
                "{n2} came with {a thing} and some milk and showed {n1} what to do.",
            ],
            &[
                "For three days the {beast} slept, and {n1} hardly slept at all.",
                "Every [morning|evening|two hours] {n1} gave it [milk|water|some {vegetable}], {because}.",
                "{n1} called the {beast} [Button|Pepper|Biscuit|Thimble|Acorn|Captain], and soon it knew its name.",
            ],
            &[
                "On {day1} the {beast} [stood up|ate|ran through the {room}] for the first time.",
                "When spring came, the {beast} was [as strong as ever|twice as big].",
                "Then, one morning, it jumped onto the table and ate all the {meal}.",
            ],
            &[
                "{n1} knew that it was time to say goodbye, and {he1} opened the door {manner}.",
                "They brought it back to {place1}, where {n3} was waiting to see it go.",
                "\"It wants to go home,\" said {n2}, and {n1} knew that it was true.",
            ],
            &[
                "The {beast} looked back once and was gone.",
                "But every {season} the {beast} comes back to {home}, and it always stops at {his1} door.",
                "The {beast} would not leave, and so it stayed with {n1} [for good|for many years].",
            ],
        ],
    )
}

fn contest(scene: &mut Scene, dice: &mut Dice) -> Vec<String> {
    let points = dice.between(11, 60);
    let more = points + dice.between(1, 9);
    scene.set("few", spelled(points));
    scene.set("many", spelled(more));
    scene.set(
        "diff",
        counted(&spelled(more - points), more - points, "point"),
    );
    let game = dice.pick(&[
        "rowing",
        "baking",
        "kite flying",
        "riddle",
        "running",
        "singing",
        "chess",
        "cheese rolling",
        "sheep shearing",
        "fishing",
    ]);
    scene.set("game", game);
    tell(
        scene,
        dice,
        &[
            &[
                "Every {season} there is a {game} contest in {home}, and the prize is always {a obj}.",
                "That year the prize of the great {game} contest of {home} was {a obj}.",
            ],
            &[
                "{n1} had never won it, but {n2} from {away} had won it [twice|three times|every year].",
                "{n1} and {n2} had both been practising since the {season}.",
                "\"You will never beat {n2},\" said {his1} {kin1}, \"but you can try.\"",
            ],
            &[
                "On {day1}, at {clock}, everybody came to {place1}.",
                "The contest began at {clock} in front of {place1}, although {weather}.",
            ],
            &[
                "{n2} went first and got {few} points.",
                "{n2} did very well: the judge, {a nature} {job}, wrote down {few} points.",
            ],
            &[
                "Then it was {n1}'s turn, and {his1} hands were shaking.",
                "{n1} stepped forward {manner} and did not look at anyone.",
                "{he1} thought of what {n3} had taught {him1}, and began {manner}.",
            ],
            &[
                "When it was over, the judge counted twice. {n1} had {many} points.",
                "\"{many} points for {n1}!\" called the judge.",
            ],
            &[
                "So {n1} won by {diff}, and {n2} was the first to shake {his1} hand.",
                "{n1} was {diff} ahead of {n2}, and the {it} was {hers1} to keep.",
            ],
            &[
                "\"Next year I will win it back,\" said {n2}, and both of them laughed.",
                "{n1} carried the {it} home and put it {spot}.",
                "Afterwards there was {meal} for everyone, and {n3} played the {instrument}.",
            ],
        ],
    )
}

fn mystery(scene: &mut Scene, dice: &mut Dice) -> Vec<String> {
    scene.set(
        "sign",
        dice.pick(&[
            "a strange light",
            "a soft knocking",
            "a low humming",
            "a smell of smoke",
            "the sound of a bell",
            "a line of small footprints",
        ]),
    );
    tell(
        scene,
        dice,
        &[
            &[
                "Every night at {clock}, {n1} noticed {sign} near {place1}.",
                "One night {he1} was woken by {sign} from {place1}.",
                "It began on {day1} with {sign} behind {place1}.",
            ],
            &[
                "The {job2} said that it was only the wind, and the {job} said that it was a ghost.",
                "Nobody else had noticed anything, and {his1} {kin1} told {him1} to go back to sleep.",
                "\"There is always a reason,\" {he1} thought, {because}.",
            ],
            &[
                "So {n1} took {a obj} and went to look, and {n2} came with {him1}.",
                "\"I am not afraid,\" said {n2}, although {he2} was holding {n1} by the sleeve.",
                "The next night {n1} and {n2} hid near {place1} with {a obj} and waited.",
            ],
            &[
                "At first there was nothing but darkness and {a animal} in the grass.",
                "It was so dark that {n2} walked into {a thing}, and they nearly gave up.",
                "They waited an hour, and then another one, while {weather}.",
            ],
            &[
                "Then there it was again: {sign}, and this time quite close.",
                "\"Do you see that?\" whispered {n1}. \"I see it,\" whispered {n2}.",
                "Suddenly {n2} pointed to a small door that neither of them had ever seen.",
            ],
            &[
                "It was no ghost at all. It was {n3}, the {nature} {job}, who was [looking for {a thing}|{hobby} in secret|feeding {a beast}].",
                "Behind the wall they found {a beast} that had got its foot caught in {a thing}.",
                "{n3} was standing there with {a thing} in {his3} hand. \"You have found me out,\" {he3} said.",
            ],
            &[
                "All three of them had to laugh, and {n3} made them promise to tell nobody.",
                "{n1} and {n2} helped as well as they could, and by {clock} everything was quiet.",
                "They went home through the silent streets, {feeling} and cold, and told the {job2} about it.",
            ],
        ],
    )
}

fn gift(scene: &mut Scene, dice: &mut Dice) -> Vec<String> {
    tell(
        scene,
        dice,
        &[
            &[
                "On {his1} birthday, {n1} was given {a obj} by {his1} {kin1}.",
                "{his1} {kin1} came back from {away} and brought {him1} {a obj}.",
                "At the market of {away}, {he1} bought {a obj} from {a nature} {job} for {his1} {kin1}.",
            ],
            &[
                "It was {look} and {look}, and it smelled of {material}.",
                "At first {n1} did not know what to do with the {it}.",
                "{he1} put the {it} {spot} and looked at it every evening.",
            ],
            &[
                "But {n2}, who lived next door, had [no {it} at all|only an old, broken {it}].",
                "One day {n2} came to visit. \"What a {look} {it}!\" {he2} said.",
                "Then {n1} heard that {n2} had lost everything in the [storm|flood|fire].",
            ],
            &[
                "{n1} thought about it for [two days|a whole week|a night], {because}.",
                "\"{he2} needs it more than I do,\" said {n1} to {his1} {kin}.",
            ],
            &[
                "On {day1} {he1} went to {n2} and gave {him2} the {it}.",
                "So {he1} wrapped up the {it} and left it {manner} in front of {n2}'s door.",
            ],
            &[
                "{n2} could not believe it. \"For me?\" {he2} asked. \"For you,\" said {n1}.",
                "{n2} was so {feeling} that {he2} did not say anything for a while.",
            ],
            &[
                "A year later, {n2} came back with {a thing} that {he2} had made {himself2}.",
                "And the next day there was a pot of {meal} on {n1}'s doorstep, still warm.",
                "Since then {n2} has taught {n1} the {instrument}, and on {day} they play together at {place2}.",
            ],
        ],
    )
}

fn stranger(scene: &mut Scene, dice: &mut Dice) -> Vec<String> {
    tell(
        scene,
        dice,
        &[
            &[
                "One evening a stranger came to {place1} and asked for [a bed|some bread|the way to {away}].",
                "In the {season}, {a nature} stranger called {n2} came to {home} with {a obj} on {his2} back.",
                "{n1} was {hobby} when somebody knocked {manner}. It was a stranger with {a obj}.",
            ],
            &[
                "\"My name is {n2},\" said the stranger, \"and I come from {away}.\"",
                "The stranger's name was {n2}, and {he2} had once been {a job2} in {away}.",
            ],
            &[
                "People did not trust {him2}: the {job} locked the door, and {n3} said that {he2} should go away.",
                "\"We have no room,\" said {n3}, who had an empty house with nine beds.",
            ],
            &[
                "But {n1} gave {n2} some {meal} and {a thing} to sleep on.",
                "Only {n1} said, \"Come in and sit by the fire.\"",
            ],
            &[
                "In the night {weather}, and the water of the river rose [higher and higher|up to the doors].",
                "That same night a fire broke out in {place2}, and everybody ran into the street.",
                "The next day the well was dry, and nobody knew what to do.",
            ],
            &[
                "{n2} was the only one who knew how to help, for {he2} had seen the same thing in {away}.",
                "\"Bring me {a thing}, {a thing} and a long rope,\" said {n2}, and {n1} ran.",
                "With {his2} {it}, {n2} worked until {clock}, and {n1} worked beside {him2}.",
            ],
            &[
                "In the end {home} was safe, and even {n3} had to say thank you.",
                "\"I was wrong about you,\" said {n3}. \"You were,\" said {n2}, \"but now you know.\"",
            ],
            &[
                "{n2} left the next morning, but {he2} gave the {it} to {n1}.",
                "They asked {him2} to stay, and {n2} became the {job2} of {home}.",
            ],
        ],
    )
}

/// Who has how many of what, step by step, with the sums right.
pub(crate) fn counting(dice: &mut Dice) -> String {
    let mut out = Vec::new();
    for _ in 0..dice.between(1, 3) {
        let (text, [first, second], _) = trade(dice);
        out.push(format!("{text} {first} {second}"));
    }
    out.join("\n\n")
}

/// A trade of two people: its text, a sentence on what each has at the end,
/// and the questions and answers it gives.
pub(crate) fn trade(dice: &mut Dice) -> (String, [String; 2], Vec<(String, String)>) {
    let (mut scene, _) = cast(dice, 2);
    let goods = [
        words::THINGS,
        words::list("fruit"),
        words::list("vegetable"),
    ];
    let kind = dice.below(goods.len());
    let noun = dice.pick(goods[kind]).to_owned();
    let mut has = [dice.between(3, 12), dice.between(0, 9)];
    let digits = dice.chance(40);
    let number = |many: usize| match digits {
        true => many.to_string(),
        false => spelled(many),
    };
    let amount = |many: usize| match many {
        0 => format!("no {}", plural(&noun)),
        many => counted(&number(many), many, &noun),
    };
    scene.set("a", amount(has[0]));
    scene.set("b", amount(has[1]));
    scene.set("items", plural(&noun));
    let mut text = vec![scene.one(
        dice,
        &[
            "{n1} has {a}, and {n2} has {b}.",
            "At the beginning, {n1} has {a} and {n2} has {b}.",
            "{n1} [owns|keeps] {a}. {n2} [owns|keeps] {b}.",
        ],
    )];
    for _ in 0..dice.between(1, 3) {
        let giver = if has[0] == 0 {
            1
        } else if has[1] == 0 {
            0
        } else {
            dice.below(2)
        };
        scene.set(
            "g",
            scene.raw(dice, if giver == 0 { "{n1}" } else { "{n2}" }),
        );
        scene.set(
            "t",
            scene.raw(dice, if giver == 0 { "{n2}" } else { "{n1}" }),
        );
        scene.set(
            "p",
            scene.raw(dice, if giver == 0 { "{he1}" } else { "{he2}" }),
        );
        let kind = dice.weighted(&[5, 2, 2]);
        let many = match kind {
            2 => dice.between(1, 4),
            _ => dice.between(1, has[giver].clamp(1, 6)),
        };
        if kind != 2 && has[giver] < many {
            continue;
        }
        scene.set("m", amount(many));
        scene.set("mm", number(many));
        match kind {
            0 => {
                has[giver] -= many;
                has[1 - giver] += many;
                text.push(scene.one(
                    dice,
                    &[
                        "{g} gives {mm} [of them|of the {items}] to {t}.",
                        "{g} gives {m} to {t}.",
                        "{t} gets {m} from {g}.",
                        "Then {g} gives {t} {m}.",
                    ],
                ));
            }
            1 => {
                has[giver] -= many;
                text.push(scene.one(
                    dice,
                    &[
                        "{g} [loses|sells|breaks] {m}.",
                        "On the way home, {g} loses {m}.",
                        "Then {g} sells {m} at the market.",
                    ],
                ));
            }
            _ => {
                has[giver] += many;
                text.push(scene.one(
                    dice,
                    &[
                        "{g} [finds|buys] {mm} more.",
                        "Then {g} buys {mm} more at the market.",
                        "{g} gets {mm} more from [a neighbour|a friend|an uncle].",
                    ],
                ));
            }
        }
        if dice.chance(50) {
            scene.set(
                "now",
                match has[giver] {
                    0 => "none".to_owned(),
                    many => number(many),
                },
            );
            text.push(scene.one(
                dice,
                &[
                    "Now {p} has {now}.",
                    "So {g} has {now} left.",
                    "That leaves {g} with {now}.",
                ],
            ));
        }
    }
    let (a, b) = (amount(has[0]), amount(has[1]));
    scene.set("a", &a);
    scene.set("b", &b);
    let ends = [
        scene.one(
            dice,
            &[
                "In the end, {n1} has {a}.",
                "Now {n1} has {a}.",
                "At the end {n1} has {a}.",
            ],
        ),
        scene.one(dice, &["{n2} has {b}.", "And {n2} has {b}."]),
    ];
    let mut questions = vec![
        (
            scene.say(dice, "How many {items} does {n1} have [now|in the end|]?"),
            scene.say(dice, "{n1} has {a}."),
        ),
        (
            scene.say(dice, "How many {items} does {n2} have [now|in the end|]?"),
            scene.say(dice, "{n2} has {b}."),
        ),
    ];
    let total = amount(has[0] + has[1]);
    questions.push((
        scene.say(dice, "How many {items} do they have together?"),
        tidy(&format!("Together they have {total}.")),
    ));
    if has[0] != has[1] {
        let most = if has[0] > has[1] { "{n1}" } else { "{n2}" };
        questions.push((
            scene.say(
                dice,
                "Who has more {items} [now|in the end|], {n1} or {n2}?",
            ),
            scene.say(dice, &format!("{most} has more {{items}}.")),
        ));
    }
    (text.join(" "), ends, questions)
}

/// A chain of swaps, with who holds what at the end.
fn swaps(dice: &mut Dice) -> String {
    let count = dice.between(3, 4);
    let people = Person::draw_some(dice, count);
    let things = dice.sample(words::THINGS, count);
    let mut holds: Vec<String> = things.iter().map(|thing| object(dice, thing)).collect();
    let mut scene = Scene::default();
    let list = |holds: &[String]| {
        let each: Vec<String> = people
            .iter()
            .zip(holds)
            .map(|(person, held)| format!("{} has the {held}", person.first))
            .collect();
        joined(&each)
    };
    scene.set("list", list(&holds));
    scene.draw(dice, "where", "place");
    let mut text = vec![scene.one(
        dice,
        &[
            "[Some|A few] friends meet at {where} to swap things. {list}.",
            "On market day, {list}.",
            "This is how it begins: {list}.",
        ],
    )];
    for _ in 0..dice.between(2, 4) {
        let pair = dice.sample(&(0..count).collect::<Vec<_>>(), 2);
        let (one, two) = (pair[0], pair[1]);
        scene.set("one", &people[one].first);
        scene.set("two", &people[two].first);
        scene.set("x", &holds[one]);
        scene.set("y", &holds[two]);
        text.push(scene.one(
            dice,
            &[
                "{one} gives the {x} to {two} and gets the {y}.",
                "{one} and {two} swap: now {one} has the {y} and {two} has the {x}.",
                "{two} likes the {x}, so {one} takes the {y} instead.",
                "Then {one} swaps the {x} for the {y} of {two}.",
            ],
        ));
        holds.swap(one, two);
    }
    scene.set("list", list(&holds));
    text.push(scene.one(
        dice,
        &[
            "In the end, {list}.",
            "So at the end of the day {list}.",
            "When they go home, {list}.",
        ],
    ));
    paragraphs(dice, &text)
}

/// Entries of a diary.
fn diary(dice: &mut Dice) -> String {
    const EVENTS: &[&str] = &[
        "I went to {place} with {n1} [and we stayed until {clock}|because {he1} had asked me to|, who talked about {hobby} the whole time].",
        "{n2} came to visit and brought {a look} {thing}.",
        "In the afternoon I [mended|cleaned|painted|looked for|finished] the {thing1}, which took [an hour|two hours|longer than I thought].",
        "I bought {a colour} {thing} at the market, and I do not regret it.",
        "{n1} showed me how to play the {instrument}, and I was not as bad as I had feared.",
        "For supper there was {dish}, and I ate too much of it.",
        "I saw {a animal} near {place}, and it was not afraid of me.",
        "I wrote a letter to {n2}, who now lives in {home}.",
        "{n1} says that {saying}, and I think {he1} is right.",
        "I have been thinking about {hobby} again.",
        "I could not find my {thing} and looked for it everywhere; it was {spot}.",
    ];
    let (mut scene, _) = cast(dice, 2);
    scene.set("home", town(dice));
    let month = dice.pick(words::list("month")).to_owned();
    let mut day = dice.between(1, 18);
    let mut weekday = dice.below(7);
    let mut out = Vec::new();
    for _ in 0..dice.between(2, 4) {
        scene.set("thing1", dice.pick(words::THINGS));
        let mut lines = vec![scene.one(
            dice,
            &[
                "Today {weather}.",
                "{weather}, and I was {feeling}.",
                "I got up at {clock} although {weather}.",
            ],
        )];
        let count = dice.between(2, 4);
        for event in dice.sample(EVENTS, count) {
            lines.push(scene.say(dice, event));
        }
        lines.push(scene.one(dice, &[
            "Tomorrow I want to [go to {place}|see {n1} again|finish the {thing1}|sleep until {clock}].",
            "Now I am {feeling} and going to bed.",
            "It was a [good|quiet|long|strange] day.",
            "I hope that {n2} will come again [on {day}|soon].",
        ]));
        out.push(format!(
            "{}, {day} {month}\n{}",
            words::list("day")[weekday],
            lines.join(" ")
        ));
        let step = dice.between(1, 3);
        day += step;
        weekday = (weekday + step) % 7;
    }
    out.join("\n\n")
}

/// A weather report for some towns.
fn forecast(dice: &mut Dice) -> String {
    let mut scene = Scene::default();
    let weekday = dice.pick(words::list("day"));
    scene.set("today", weekday);
    let mut lines = vec![scene.one(
        dice,
        &[
            "The weather for {today}:",
            "This is the weather report for {today}.",
            "How will the weather be on {today}?",
        ],
    )];
    let towns: Vec<String> = (0..dice.between(3, 5)).map(|_| town(dice)).collect();
    for place in &towns {
        let (low, high) = (dice.between(1, 14), dice.between(15, 29));
        scene.set("place1", place);
        scene.set("low", low.to_string());
        scene.set("high", high.to_string());
        lines.push(scene.one(dice, &[
            "In {place1} it will be [sunny|cloudy|dry and bright|wet and windy], with {low} degrees in the morning and {high} degrees in the afternoon.",
            "{place1} can expect [rain|sunshine|fog|a strong wind|some clouds] until {clock}, and up to {high} degrees.",
            "[Rain|Fog|A light wind|Sunshine] [in|around] {place1}: between {low} and {high} degrees.",
            "People in {place1} should take [an umbrella|a coat|a hat] with them, for there will be [showers|wind|strong sun] and only {low} degrees in the evening.",
        ]));
    }
    scene.set("first", &towns[0]);
    lines.push(scene.one(dice, &[
        "On the day after, it will be [warmer|colder|much the same] everywhere, and in {first} the wind will [grow stronger|die down].",
        "The road from {first} to {place1} is [open|closed because of snow|under water near {place}].",
        "The ferry of {first} leaves [one hour later|as usual|only if the wind allows it].",
    ]));
    paragraphs(dice, &lines)
}

/// What stands in a shop or in a warehouse, with codes and numbers.
fn stock(dice: &mut Dice) -> String {
    let (mut scene, _) = cast(dice, 2);
    scene.set("home", town(dice));
    let mut lines = vec![scene.one(dice, &[
        "The shop of {f1} in {home} is [small|narrow|old], but it is full of useful products.",
        "The warehouse of {home} has [four|five|six] halls, and {f1} knows where everything stands.",
        "{n1} keeps a shop near {place} in {home}, and {n2} works for {him1} on {day} and {day}.",
        "Every {day}, {f1} counts everything in the warehouse and writes it into a book, category by category.",
    ])];
    let mut seen: Vec<(String, String, usize)> = Vec::new();
    for thing in dice
        .sample(words::THINGS, 6)
        .into_iter()
        .take(dice.between(3, 6))
    {
        let many = dice.between(2, 48);
        let (article, phrase) = (code(dice), object(dice, thing));
        scene.set("many", counted(&figure(dice, many), many, &phrase));
        scene.set("code1", &article);
        scene.set("one", &phrase);
        scene.set("price", dice.between(2, 90).to_string());
        scene.set("row", dice.between(1, 30).to_string());
        lines.push(scene.one(dice, &[
            "[On the left|On the right|At the back|Near the window|On the first shelf|On the second shelf|In a box by the door] [there are|one finds|{n1} keeps] {many}, and each of them has the code {code1}.",
            "In row {row} stand {many}, number {code1} in the book.",
            "The {one} with the code {code1} costs {price} crowns, and row {row} holds {many}.",
            "{code1}: {many}, at {price} crowns each.",
            "Then there are {many} (code {code1}), which are sold for {price} crowns.",
        ]));
        seen.push((phrase, article, many));
    }
    let (phrase, article, many) = dice.choose(&seen).clone();
    scene.set("one", phrase);
    scene.set("code1", article);
    scene.set("left", (many - 1).to_string());
    scene.set("order", digits(dice, 4));
    lines.push(scene.one(dice, &[
        "This morning {n2} ordered one {one}, so {n1} took it down, wrote {code1} on the parcel and put it {spot}; now {left} are left.",
        "When a customer asks for the {one}, {n1} says \"{code1}\" at once, {because}.",
        "Parcel {order} goes to {f2} today: one {one}, {code1}, with a note of thanks.",
        "A replacement for the {one} has the same code, {code1}, and the same price.",
    ]));
    lines.push(scene.one(dice, &[
        "The shop opens at {clock} and closes at {clock}.",
        "Whoever breaks something pays half of it; that is the rule of the house.",
        "Damaged goods stand [in the cellar|behind the curtain], where {n2} repairs them in the winter.",
        "Deliveries come on {day}, and the carrier always wants coffee first.",
        "\"Customers first,\" {n1} likes to say, \"and then the {thing}.\"",
    ]));
    paragraphs(dice, &lines)
}

/// A letter from one person to another.
fn letter(dice: &mut Dice) -> String {
    let people = Person::draw_some(dice, 3);
    letter_from(dice, &people[0], &people[1], None)
}

/// A letter from `from` to `to`, about `thing` if there is one.
pub(crate) fn letter_from(
    dice: &mut Dice,
    from: &Person,
    to: &Person,
    thing: Option<&str>,
) -> String {
    let mut scene = Scene::default();
    let mut people = vec![from.clone(), to.clone()];
    Person::join(dice, &mut people, 3);
    people.rotate_right(1);
    world::bind(&people, &mut scene);
    scene.set("home", town(dice));
    scene.set("it", thing.unwrap_or_else(|| dice.pick(words::THINGS)));
    scene.set("date1", date(dice));
    scene.set("time1", time(dice));
    let opening = scene.one(
        dice,
        &["Dear {n3},", "My dear {n3},", "Dear {f3},", "Hello {n3},"],
    );
    let mut lines = tell(
        &scene,
        dice,
        &[
            &[
                "thank you for your [long|kind|last] letter, which reached me on {day}.",
                "I hope that you are well. Here {weather}.",
                "it is [a month|three weeks|half a year] since we met, and I am still thinking of it.",
                "how are you? Here {weather}, and everyone is {feeling}.",
            ],
            &[
                "I am writing to you about the {it}.",
                "You asked me about the {it}: [I still have it|I found it|I gave it to {n1}].",
                "Something has happened to the {it} that you [lent|gave|sent] me.",
                "Do you remember the {it} {spot}?",
            ],
            &[
                "It is [as good as new|a little worn|too big for my {room}|much loved in this house], and {n1} [looks after it|wants to paint it {colour}|asks for it every day].",
                "{n1} [borrowed it|found it|repaired it], {because}, and now it stands {spot}.",
                "If you still need it, I can send it to {home} with {n1}, who leaves at {time1}.",
            ],
            &[
                "On {date1} we are having a small feast at {place}, with {dish} and music.",
                "I will be in {home} on {date1} and would love to see you at {time1}.",
                "My {kin} has begun {hobby}, and there is no end to it.",
                "{n1} has become {a job} and sends you [greetings|a kiss|best wishes].",
            ],
            &[
                "Please [come|write|answer] soon, and bring {a thing} [if you can|with you].",
                "Please tell me whether {date1} suits you.",
                "Give my love to {n1} and to your {animal}.",
                "Until then, [take care of yourself|stay warm|do not work too much].",
            ],
        ],
    );
    let closing = scene.one(
        dice,
        &[
            "Yours, {n2}",
            "With love, {n2}",
            "Best wishes, {f2}",
            "Your friend {n2}",
        ],
    );
    lines[0] = capital(&lines[0]);
    let body = paragraphs(dice, &lines);
    format!("{opening}\n\n{body}\n\n{closing}")
}

/// A recipe or a set of instructions.
pub(crate) fn recipe(dice: &mut Dice) -> String {
    let mut scene = Scene::default();
    scene.draw(dice, "dish1", "dish");
    let people = dice.between(2, 8);
    scene.set("people", figure(dice, people));
    let plants = [words::list("fruit"), words::list("vegetable")].concat();
    let mut needs = Vec::new();
    let parts = dice.sample(&plants, 3);
    for part in &parts {
        let many = dice.between(2, 9);
        needs.push(counted(&figure(dice, many), many, part));
    }
    needs.push(scene.raw(
        dice,
        "[a cup|two cups|half a cup|a spoon] of [flour|sugar|milk|water|salt|oil|honey|butter]",
    ));
    scene.set("needs", joined(&needs));
    scene.set("p1", plural(parts[0]));
    scene.set("p2", plural(parts[1]));
    scene.set("p3", plural(parts[2]));
    scene.set("minutes", (dice.between(1, 12) * 5).to_string());
    let mut steps = tell(
        &scene,
        dice,
        &[
            &[
                "[Wash|Peel|Cut|Chop] the {p1} [and put them into a bowl|into small pieces|and set them aside].",
                "Put the {p1} into a [large|small|heavy] pot.",
            ],
            &[
                "Add the {p2} and [stir|mix everything] [slowly|well|with a spoon].",
                "[Cook|Fry|Bake] the {p2} until they are [soft|brown|golden].",
            ],
            &[
                "Mix in the {p3} and wait for {minutes} minutes.",
                "Spread the {p3} over it [and cover it|with a brush].",
            ],
            &[
                "[Bake|Cook|Boil] it for {minutes} minutes.",
                "Let it [stand|cool|rest] {spot} for {minutes} minutes.",
            ],
            &[
                "Serve it [warm|cold|at once] [with bread|with a little salt|on a {colour} plate].",
                "It tastes best on the [next|same] day.",
            ],
        ],
    );
    let numbered = dice.chance(50);
    for (at, step) in steps.iter_mut().enumerate() {
        if numbered {
            *step = format!("{}. {step}", at + 1);
        }
    }
    let head = scene.one(
        dice,
        &[
            "{dish1} for {people} people",
            "How to make {dish1}",
            "My {kin}'s {dish1}, for {people} people",
        ],
    );
    let needs = scene.one(
        dice,
        &[
            "You need {needs}.",
            "For this you need {needs}.",
            "Take {needs}.",
        ],
    );
    let body = match numbered {
        true => steps.join("\n"),
        false => steps.join(" "),
    };
    let end = scene.one(
        dice,
        &[
            "This recipe comes from {place}, where {dish} is made the same way.",
            "Whoever does not like {p2} can take {p1} instead.",
            "There is enough of it for {people} people, or for one {job} after work.",
        ],
    );
    format!("{head}\n\n{needs}\n\n{body}\n\n{end}")
}

/// An entry on a town.
fn gazetteer(dice: &mut Dice) -> String {
    let (mut scene, _) = cast(dice, 2);
    scene.set("home", town(dice));
    scene.set("away", town(dice));
    scene.set("river", scene.raw(dice, "{family start}"));
    let year = dice.between(1100, 1890);
    scene.set("year", year.to_string());
    scene.set("later", (year + dice.between(20, 110)).to_string());
    scene.set("souls", (dice.between(3, 95) * 100).to_string());
    scene.set("miles", dice.between(2, 60).to_string());
    scene.set("north", dice.pick(&["north", "south", "east", "west"]));
    scene.set(
        "sight",
        dice.pick(words::list("place")).trim_start_matches("the "),
    );
    scene.set("wares", wares(dice));
    scene.set("beasts", plural(dice.pick(words::list("animal"))));
    scene.draw(dice, "good", "material");
    scene.draw(dice, "trade", "job");
    scene.draw(dice, "place1", "place");
    let lines = tell(
        &scene,
        dice,
        &[
            &[
                "{home} is a [town|small town|village|harbour town] on the river {river}, {miles} miles {north} of {away}.",
                "The [town|village|old town] of {home} lies [on a hill|in a valley|by a lake|at the mouth of the river {river}], {miles} miles from {away}.",
            ],
            &[
                "About {souls} people live there.",
                "It has {souls} inhabitants.",
                "In the year {later} it had {souls} inhabitants, and since then the number has [grown|fallen].",
            ],
            &[
                "It was founded in {year} by {f1}, {a job} who was looking for {good}.",
                "The oldest house was built in {year}, when {f1} came from {away} with [nine|twelve|forty] others.",
                "People came here because of the {good}, which was found near {place1} in {year}.",
            ],
            &[
                "{home} is known for its {look} {sight}, for its {dish} and for its [market|music|gardens].",
                "The people of {home} make {wares} out of {good}, and sell them as far away as {away}.",
                "There are more {beasts} than people in the streets, and nobody minds.",
            ],
            &[
                "In {later} a great fire destroyed {place1}, but it was built again within two years.",
                "The poet {f2} was born here in {later}, and a stone near {place1} reminds people of {him2}.",
                "Since {later} a railway has led from {home} to {away}; the journey takes {hour} hours.",
            ],
            &[
                "Every {season} there is a feast at {place1}, and visitors get {dish}.",
                "On {day} there is a market, which opens at {clock}.",
                "Those who visit {home} should see {place1} and then walk to {place}.",
            ],
        ],
    );
    paragraphs(dice, &lines)
}

/// A description of a person.
fn portrait(dice: &mut Dice) -> String {
    let (mut scene, _) = cast(dice, 2);
    scene.set("home", town(dice));
    scene.set("age", dice.between(18, 89).to_string());
    scene.draw(dice, "job1", "job");
    scene.draw(dice, "pet1", "pet");
    scene.set("wares", wares(dice));
    let lines = tell(
        &scene,
        dice,
        &[
            &[
                "{f1} is {a job1} and lives in {home}.",
                "{f1}, {a job1} from {home}, is {age} years old.",
                "Whoever comes to {home} will soon meet {f1}, the {job1}.",
            ],
            &[
                "{he1} is {nature} and {nature}, but also a little {nature}.",
                "People say that {he1} is {nature}, and {his1} {kin} says that {he1} is {nature}.",
            ],
            &[
                "{his1} house near {place} has [two|three|four] rooms, and in the {room} stands {a look} {thing}.",
                "{he1} lives alone with {a pet1} in a house full of {wares}.",
            ],
            &[
                "Every morning at {clock}, {he1} goes to {place} and works until {clock}.",
                "{he1} gets up at {clock}, drinks two cups of tea and feeds the {pet1}.",
            ],
            &[
                "In {his1} free time {he1} enjoys {hobby} and {hobby}.",
                "{he1} plays the {instrument} and is {feeling} when nobody listens.",
            ],
            &[
                "{he1} wears {a colour} [coat|hat|scarf|shirt|shawl] and carries {a material} {thing} in {his1} pocket.",
            ],
            &[
                "{his1} best friend is {n2}, who is {nature} where {n1} is {nature}.",
                "Once {he1} helped {n2} to find {a thing}, and {n2} has not forgotten it.",
            ],
            &[
                "\"{saying},\" says {n1} when people ask {him1} for advice.",
                "When {he1} is {feeling}, {he1} cooks {dish} and invites {n2}.",
                "If one asks {him1} what {he1} wants most, {he1} says: \"{a thing} and a quiet {day}.\"",
            ],
        ],
    );
    paragraphs(dice, &lines)
}

/// Notices such as hang on a board.
fn notices(dice: &mut Dice) -> String {
    let mut out = Vec::new();
    for _ in 0..dice.between(2, 4) {
        let (mut scene, _) = cast(dice, 1);
        scene.set("date1", date(dice));
        scene.set("time1", time(dice));
        scene.set("phone", digits(dice, 5));
        scene.set("home", town(dice));
        scene.set("obj", {
            let thing = dice.pick(words::THINGS);
            object(dice, thing)
        });
        scene.set("price", dice.between(3, 95).to_string());
        out.push(scene.one(dice, &[
            "Lost on {date1} near {place}: {a obj}. Whoever finds it, please bring it to {f1} or ring {phone}. The reward is {dish} for two.",
            "Found: {a obj}, {spot} of the inn of {home}. It can be fetched from {f1}, telephone {phone}, every day from {time1}.",
            "For sale: {a obj}, [hardly used|as good as new|with a few scratches], for {price} crowns. Ask for {f1}, telephone {phone}.",
            "The library of {home} is closed on {date1}, because the [roof|floor|stove] needs repairing. Books can be returned to {f1} until {time1}.",
            "On {date1} at {time1} there is a concert at {place}. {f1} plays the {instrument}. A seat costs {price} crowns; for tickets, ring {phone}.",
            "The bus to {home} leaves at {time1} from {place}. On {day} there is no bus. Questions: {f1}, telephone {phone}.",
            "Wanted: {a nature} person who can help with {hobby}, on {day} and {day}. Please write to {f1} in {home}, or ring {phone}.",
            "Lessons in {hobby} with {f1}: every {day} at {time1}, {price} crowns an hour. Telephone {phone}.",
        ]));
    }
    out.join("\n\n")
}

/// Cards or tables of key and value, with a paragraph that says the same.
fn register(dice: &mut Dice) -> String {
    let mut out = Vec::new();
    let style = dice.below(4);
    for person in Person::draw_some(dice, 3).iter().take(dice.between(1, 3)) {
        let mut scene = Scene::default();
        person.bind(&mut scene, 1);
        scene.set("job1", dice.pick(words::list("job")));
        scene.set("home", town(dice));
        scene.set("locker", digits(dice, 3));
        scene.set("day1", dice.pick(words::list("day")));
        scene.set("code1", world::code(dice));
        let pairs = [
            ("Member", "{f1}"),
            ("Town", "{home}"),
            ("Work", "{job1}"),
            ("Locker", "{locker}"),
            ("Day", "{day1}"),
            ("Key", "{code1}"),
        ];
        let pairs: Vec<String> = pairs
            .iter()
            .map(|(key, value)| {
                let value = scene.raw(dice, value);
                match style {
                    0 => format!("{key}: {value}"),
                    1 => format!("{key} = {value}"),
                    2 => format!("- {}: {value}", key.to_lowercase()),
                    _ => format!("{}: {value}", key.to_uppercase()),
                }
            })
            .collect();
        let prose = scene.one(dice, &[
            "{f1} is {a job1} from {home}. {he1} comes on {day1}, uses locker {locker} and has the key {code1}.",
            "On {day1}, locker {locker} belongs to {f1} from {home}, who works as {a job1}. The key is {code1}.",
            "{n1} lives in {home} and works as {a job1}. The key {code1} opens locker {locker}, which is {hers1} on {day1}.",
        ]);
        let card = pairs.join("\n");
        out.push(match dice.chance(50) {
            true => format!("{card}\n\n{prose}"),
            false => format!("{prose}\n\n{card}"),
        });
    }
    out.join("\n\n")
}

/// A table of some people, and what it says in a few sentences.
fn table(dice: &mut Dice) -> String {
    const COLUMNS: &[&str] = &["town", "job", "pet", "instrument", "day", "colour", "month"];
    let count = dice.between(3, 5);
    let people = Person::draw_some(dice, count);
    let columns = dice.sample(COLUMNS, 3);
    let mut rows = vec![format!("name | {}", columns.join(" | "))];
    let mut lines = Vec::new();
    for person in &people {
        let mut scene = Scene::default();
        person.bind(&mut scene, 1);
        let mut row = person.first.clone();
        for column in &columns {
            row += " | ";
            row += &scene.draw(dice, column, column);
        }
        rows.push(row);
        let column = dice.pick(&columns);
        scene.set("key", column);
        scene.set("value", scene.raw(dice, &format!("{{{column}}}")));
        lines.push(scene.one(
            dice,
            &[
                "For {n1}, the table says {value}.",
                "The {key} of {n1} is {value}.",
                "{value}: that is what stands beside {n1}.",
            ],
        ));
    }
    let text = lines.join(" ");
    let rows = rows.join("\n");
    match dice.chance(70) {
        true => format!("{rows}\n\n{text}"),
        false => format!("{text}\n\n{rows}"),
    }
}
