//! Dialogues: a user who asks and an assistant who answers from what it was told.

use crate::dice::Dice;
use crate::grammar::{Scene, capital, counted, joined, plural, tidy, with_article};
use crate::prose;
use crate::words::{self, spelled};
use crate::world::{Person, cast, code, date, digits, figure, time, town};

/// What the user says and what the assistant answers.
pub(crate) type Turn = (String, String);

/// A dialogue: an instruction to the assistant, if there is one, and turns.
pub(crate) struct Talk {
    /// The system message.
    pub(crate) system: Option<String>,
    /// The exchanges in order.
    pub(crate) turns: Vec<Turn>,
}

/// An exercise: how often it should occur, and how it is written.
type Exercise = (usize, fn(&mut Dice) -> Vec<Turn>);

/// Any dialogue: one exercise, or some short ones in a row.
pub(crate) fn any(dice: &mut Dice) -> Talk {
    const EXERCISES: &[Exercise] = &[
        (20, notes),
        (12, cards),
        (8, sums),
        (8, lists),
        (6, spelling),
        (9, kinds),
        (7, forms),
        (8, holdings),
        (8, rules),
        (9, moods),
        (5, writing),
        (4, pleasantries),
    ];
    if dice.chance(24) {
        return facts(dice);
    }
    let weights: Vec<usize> = EXERCISES.iter().map(|exercise| exercise.0).collect();
    let mut turns = Vec::new();
    loop {
        turns.extend(EXERCISES[dice.weighted(&weights)].1(dice));
        let words: usize = turns
            .iter()
            .map(|(ask, answer): &Turn| ask.split(' ').count() + answer.split(' ').count())
            .sum();
        if words >= 60 {
            break;
        }
    }
    let system = dice.chance(12).then(|| {
        Scene::default().one(
            dice,
            &[
                "You are a helpful assistant.",
                "You are a friendly assistant who answers briefly.",
                "You answer questions and help with small tasks.",
                "You work in the library of {town} and help everybody who asks.",
                "You are the clerk of the inn of {town}. Be [polite|brief|exact].",
            ],
        )
    });
    Talk { system, turns }
}

/// Something that can be said about a person, asked and answered.
struct Trait {
    key: &'static str,
    value: fn(&mut Dice) -> String,
    says: &'static [&'static str],
    asks: &'static [&'static str],
    answer: &'static str,
}

fn from_list(dice: &mut Dice, name: &str) -> String {
    Scene::default().raw(dice, &format!("{{{name}}}"))
}

const TRAITS: &[Trait] = &[
    Trait {
        key: "town",
        value: town,
        says: &[
            "{n1} lives in {v}.",
            "{n1} has just moved to {v}.",
            "{his1} house is in {v}.",
            "{n1} comes from {v}.",
        ],
        asks: &[
            "Where does {n1} live?",
            "Which town is {n1} from?",
            "In which town can one find {n1}?",
        ],
        answer: "{n1} lives in {v}.",
    },
    Trait {
        key: "job",
        value: |dice| from_list(dice, "job"),
        says: &[
            "{n1} works as {a v}.",
            "{n1} is {a v}.",
            "{n1} became {a v} [last year|long ago].",
        ],
        asks: &[
            "What is {n1}'s job?",
            "What does {n1} do for a living?",
            "What does {n1} work as?",
        ],
        answer: "{n1} is {a v}.",
    },
    Trait {
        key: "pet",
        value: |dice| from_list(dice, "pet"),
        says: &[
            "{n1} keeps {a v}.",
            "{n1} has {a v} at home.",
            "{a v} sleeps in {his1} {room}.",
        ],
        asks: &["What pet does {n1} have?", "Which animal does {n1} keep?"],
        answer: "{n1} has {a v}.",
    },
    Trait {
        key: "age",
        value: |dice| dice.between(7, 98).to_string(),
        says: &[
            "{n1} is {v} years old.",
            "{n1} turned {v} in {month}.",
            "At {v}, {n1} still enjoys {hobby}.",
        ],
        asks: &["How old is {n1}?", "What is {n1}'s age?"],
        answer: "{n1} is {v} years old.",
    },
    Trait {
        key: "day",
        value: |dice| from_list(dice, "day"),
        says: &[
            "{n1} goes to {place} on {v}.",
            "On {v}, {n1} is never at home.",
            "{n1} is free on {v}.",
        ],
        asks: &[
            "Which day is mentioned for {n1}?",
            "Which day of the week goes with {n1}?",
        ],
        answer: "For {n1} it is {v}.",
    },
    Trait {
        key: "time",
        value: time,
        says: &[
            "{n1} gets up at {v}.",
            "{his1} train leaves at {v}.",
            "{n1} will be there at {v}.",
        ],
        asks: &[
            "What time is mentioned for {n1}?",
            "Which time goes with {n1}?",
        ],
        answer: "For {n1} it is {v}.",
    },
    Trait {
        key: "colour",
        value: |dice| from_list(dice, "colour"),
        says: &[
            "{his1} coat is {v}.",
            "{n1} painted {his1} door {v}.",
            "{his1} favourite colour is {v}.",
        ],
        asks: &[
            "Which colour goes with {n1}?",
            "Which colour is mentioned for {n1}?",
        ],
        answer: "The colour is {v}.",
    },
    Trait {
        key: "instrument",
        value: |dice| from_list(dice, "instrument"),
        says: &[
            "{n1} plays the {v}.",
            "{n1} is learning to play the {v}.",
            "{his1} {kin} gave {him1} lessons on the {v}.",
        ],
        asks: &["Which instrument does {n1} play?", "What does {n1} play?"],
        answer: "{n1} plays the {v}.",
    },
    Trait {
        key: "room",
        value: |dice| dice.between(1, 399).to_string(),
        says: &[
            "{n1} sleeps in room {v}.",
            "{n1} is staying in room {v}.",
            "{his1} things are in room {v}.",
        ],
        asks: &["Which room does {n1} have?", "In which room is {n1}?"],
        answer: "{n1} is in room {v}.",
    },
    Trait {
        key: "locker",
        value: |dice| {
            let many = 2 + dice.below(3) as u32;
            digits(dice, many)
        },
        says: &[
            "{n1} uses locker {v}.",
            "{his1} locker number is {v}.",
            "{n1} keeps {a thing} in locker {v}.",
        ],
        asks: &[
            "Which locker does {n1} use?",
            "What is {n1}'s locker number?",
        ],
        answer: "{n1} uses locker {v}.",
    },
    Trait {
        key: "code",
        value: code,
        says: &[
            "{his1} library card has the code {v}.",
            "{n1} signed in with the code {v}.",
            "The code of {n1} is {v}.",
        ],
        asks: &["What is {n1}'s code?", "Which code belongs to {n1}?"],
        answer: "{n1} has the code {v}.",
    },
    Trait {
        key: "phone",
        value: |dice| {
            let many = 4 + dice.below(3) as u32;
            digits(dice, many)
        },
        says: &[
            "{n1} can be reached at {v}.",
            "{his1} telephone number is {v}.",
            "To speak to {n1}, ring {v}.",
        ],
        asks: &[
            "What is {n1}'s telephone number?",
            "Which number should I ring for {n1}?",
        ],
        answer: "The number is {v}.",
    },
    Trait {
        key: "hobby",
        value: |dice| from_list(dice, "hobby"),
        says: &[
            "{n1} enjoys {v}.",
            "{n1} spends {his1} evenings {v}.",
            "There is nothing {n1} likes more than {v}.",
        ],
        asks: &["What is {n1}'s hobby?", "What does {n1} enjoy?"],
        answer: "{n1} enjoys {v}.",
    },
    Trait {
        key: "gift",
        value: |dice| from_list(dice, "thing"),
        says: &[
            "{n1} was given {a v} by {his1} {kin}.",
            "{n1} got {a v} for {his1} birthday.",
            "{his1} {kin} gave {him1} {a v}.",
        ],
        asks: &["What was {n1} given?", "Which gift did {n1} get?"],
        answer: "{n1} was given {a v}.",
    },
    Trait {
        key: "purchase",
        value: |dice| from_list(dice, "thing"),
        says: &[
            "{n1} bought {a look} {v} at the market.",
            "{n1} has bought {a colour} {v}.",
            "In {town}, {n1} bought {a v}.",
        ],
        asks: &["What did {n1} buy?", "What has {n1} bought?"],
        answer: "{n1} bought {a v}.",
    },
    Trait {
        key: "birthday",
        value: date,
        says: &[
            "{n1} was born on {v}.",
            "{his1} birthday is {v}.",
            "{n1} has {his1} birthday on {v}.",
        ],
        asks: &["When is {n1}'s birthday?", "On which date was {n1} born?"],
        answer: "{n1}'s birthday is {v}.",
    },
    Trait {
        key: "books",
        value: |dice| dice.between(2, 900).to_string(),
        says: &[
            "{n1} owns {v} books.",
            "There are {v} books in {his1} house.",
            "{n1} has read {v} books.",
        ],
        asks: &[
            "How many books are mentioned for {n1}?",
            "How many books go with {n1}?",
        ],
        answer: "It is {v} books.",
    },
    Trait {
        key: "meal",
        value: |dice| from_list(dice, "dish"),
        says: &[
            "{n1} likes {v} best.",
            "{his1} favourite meal is {v}.",
            "{n1} cooks {v} for {his1} friends.",
        ],
        asks: &[
            "What is {n1}'s favourite meal?",
            "Which meal goes with {n1}?",
        ],
        answer: "The meal is {v}.",
    },
];

/// A fact: a person's number in the cast, the trait and its value.
struct Fact {
    who: usize,
    about: &'static Trait,
    value: String,
}

impl Fact {
    fn scene(&self, people: &[Person]) -> Scene {
        let mut scene = Scene::default();
        people[self.who].bind(&mut scene, 1);
        scene.set("v", &self.value);
        scene
    }
}

/// Facts on some people, each trait at most once a person, and a text of them.
fn passage(dice: &mut Dice, people: &[Person], each: usize) -> (String, Vec<Fact>) {
    let mut facts = Vec::new();
    let mut lines = Vec::new();
    for who in 0..people.len() {
        let traits: Vec<usize> = (0..TRAITS.len()).collect();
        for (at, number) in dice.sample(&traits, each).into_iter().enumerate() {
            let about = &TRAITS[number];
            let fact = Fact {
                who,
                about,
                value: (about.value)(dice),
            };
            let mut scene = fact.scene(people);
            // The first sentence on a person names the person; later ones may not.
            let named: Vec<&str> = about
                .says
                .iter()
                .copied()
                .filter(|line| line.contains("{n1}"))
                .collect();
            let line = match at {
                0 => dice.pick(&named),
                _ => dice.pick(about.says),
            };
            if at == 0 && dice.chance(30) {
                scene.set("n1", people[who].full());
            } else if at > 0 && dice.chance(60) {
                let he = scene.raw(dice, "{he1}");
                if line.starts_with("{n1}") {
                    scene.set("n1", he);
                }
            }
            lines.push(scene.say(dice, line));
            facts.push(fact);
        }
    }
    (lines.join(" "), facts)
}

/// Questions on a text, answered in the way that the system message asks for.
fn facts(dice: &mut Dice) -> Talk {
    let count = dice.between(1, 3);
    let people = Person::draw_some(dice, count);
    let each = dice.between(
        if count == 1 { 4 } else { 2 },
        if count == 3 { 3 } else { 5 },
    );
    let (text, facts) = passage(dice, &people, each);
    let manner = dice.below(4);
    let system = match manner {
        0 => Some(dice.pick(&[
            "Answer in a full sentence.",
            "You answer in full sentences.",
            "Always answer with a whole sentence.",
        ])),
        1 => Some(dice.pick(&[
            "Answer with as few words as you can.",
            "You give short answers, without a sentence.",
            "Answer briefly: only what was asked for.",
        ])),
        _ => None,
    };
    let mut turns = Vec::new();
    let many = dice.between(2, 4).min(facts.len());
    let order: Vec<usize> = (0..facts.len()).collect();
    for (at, number) in dice.sample(&order, many).into_iter().enumerate() {
        let fact = &facts[number];
        let mut scene = fact.scene(&people);
        scene.set("key", fact.about.key);
        let unique = facts
            .iter()
            .filter(|other| other.value == fact.value || other.about.key == fact.about.key)
            .count()
            == 1;
        let (ask, answer) = match dice.below(6) {
            0 if unique => (
                scene.one(
                    dice,
                    &[
                        "Who does \"{v}\" belong to?",
                        "Whose {key} is {v}?",
                        "Which of them goes with \"{v}\"?",
                    ],
                ),
                match manner {
                    0 => format!("It is {}.", people[fact.who].first),
                    _ => people[fact.who].first.clone(),
                },
            ),
            1 => {
                let said = dice.chance(50);
                let claim = match said {
                    true => fact.value.clone(),
                    false => (fact.about.value)(dice),
                };
                let right = claim == fact.value;
                scene.set("claim", &claim);
                let ask = scene.one(
                    dice,
                    &[
                        "Is it true that the {key} of {n1} is \"{claim}\"?",
                        "Does the text say \"{claim}\" about the {key} of {n1}?",
                    ],
                );
                let full = scene.say(dice, fact.about.answer);
                let answer = match (manner, right) {
                    (1, true) => "Yes".to_owned(),
                    (1, false) => "No".to_owned(),
                    (_, true) => format!("Yes. {full}"),
                    (_, false) => format!("No. {full}"),
                };
                (ask, answer)
            }
            _ => {
                let ask = scene.one(dice, fact.about.asks);
                let short = match manner {
                    0 => false,
                    1 => true,
                    _ => dice.chance(50),
                };
                let ask = match (manner, short) {
                    (2.., true) => format!(
                        "{ask} {}",
                        dice.pick(&[
                            "Answer briefly.",
                            "A short answer, please.",
                            "Only the answer, please."
                        ])
                    ),
                    _ => ask,
                };
                let answer = match short {
                    true => fact.value.clone(),
                    false => scene.say(dice, fact.about.answer),
                };
                (ask, answer)
            }
        };
        let ask = match at {
            0 => match dice.below(3) {
                0 => format!("{text}\n\n{ask}"),
                1 => format!("{ask}\n\n{text}"),
                _ => format!("Read this: {text} {ask}"),
            },
            _ => ask,
        };
        turns.push((ask, answer));
    }
    Talk {
        system: system.map(str::to_owned),
        turns,
    }
}

/// How a card is to be written, and how one asks for it.
const STYLES: &[(&str, &[&str])] = &[
    (
        "line",
        &[
            "one per line",
            "each on its own line",
            "with one line for each",
        ],
    ),
    (
        "equals",
        &[
            "with equals signs",
            "as key = value",
            "with an equals sign between",
        ],
    ),
    (
        "bullet",
        &[
            "as a list with dashes",
            "as a list",
            "with a dash in front of each",
        ],
    ),
    (
        "comma",
        &[
            "in one line, with commas",
            "separated by commas",
            "all in one line",
        ],
    ),
    (
        "value",
        &[
            "only the values",
            "just the values, without the keys",
            "the values alone",
        ],
    ),
    (
        "paren",
        &[
            "in brackets",
            "with brackets around each",
            "each in brackets",
        ],
    ),
];

/// The card of `pairs` in style number `style`.
fn card(pairs: &[(String, String)], style: usize) -> String {
    let each = |form: &dyn Fn(&str, &str) -> String, between: &str| {
        let lines: Vec<String> = pairs.iter().map(|(key, value)| form(key, value)).collect();
        lines.join(between)
    };
    match STYLES[style].0 {
        "line" => each(&|key, value| format!("{key}: {value}"), "\n"),
        "equals" => each(&|key, value| format!("{key} = {value}"), "\n"),
        "bullet" => each(&|key, value| format!("- {key}: {value}"), "\n"),
        "comma" => each(&|key, value| format!("{key}: {value}"), ", "),
        "value" => each(&|_, value| value.to_owned(), ", "),
        _ => each(&|key, value| format!("({key}: {value})"), " "),
    }
}

/// The request for a card of `keys`, put before or after `text`.
fn card_request(dice: &mut Dice, text: &str, keys: &[String], style: usize) -> String {
    let mut scene = Scene::default();
    scene.set("keys", joined(keys));
    scene.set("style", dice.pick(STYLES[style].1));
    let ask = scene.one(
        dice,
        &[
            "Make a card with {keys}, {style}.",
            "Write down {keys}, {style}.",
            "Please note {keys}, {style}.",
            "What are {keys}? Write them {style}.",
            "Give me {keys}, {style}.",
        ],
    );
    match dice.chance(60) {
        true => format!("{ask}\n\n{text}"),
        false => format!("{text}\n\n{ask}"),
    }
}

/// Facts about one person, written as a card.
fn cards(dice: &mut Dice) -> Vec<Turn> {
    let people = Person::draw_some(dice, 1);
    let each = dice.between(3, 5);
    let (text, facts) = passage(dice, &people, each);
    let mut pairs: Vec<(String, String)> = facts
        .into_iter()
        .map(|fact| (fact.about.key.to_owned(), fact.value))
        .collect();
    pairs.push(("name".to_owned(), people[0].first.clone()));
    dice.shuffle(&mut pairs);
    pairs.truncate(dice.between(2, 5));
    let style = dice.below(STYLES.len());
    let keys: Vec<String> = pairs.iter().map(|pair| pair.0.clone()).collect();
    let mut turns = vec![(card_request(dice, &text, &keys, style), card(&pairs, style))];
    if dice.chance(30) {
        let style = dice.below(STYLES.len());
        dice.shuffle(&mut pairs);
        pairs.truncate(2);
        let keys: Vec<String> = pairs.iter().map(|pair| pair.0.clone()).collect();
        let ask = format!("Now {}, {}.", joined(&keys), dice.pick(STYLES[style].1));
        turns.push((ask, card(&pairs, style)));
    }
    turns
}

/// Messages in the first person, of which some things are to be noted.
fn notes(dice: &mut Dice) -> Vec<Turn> {
    let (mut scene, people) = cast(dice, 2);
    let full = dice.chance(40);
    let name = match full {
        true => people[0].full(),
        false => people[0].first.clone(),
    };
    scene.set("me", &name);
    let mut pairs: Vec<(&str, String)> = vec![("name", name)];
    let hello = "[Hello|Good morning|Good day|Hi|Dear friends|], [my name is {me}|this is {me}|{me} here|it is me, {me}|I am {me}]";
    let bye =
        "[Thank you, {me}.|Best wishes, {me}|Many thanks! {me}|Yours, {me}|See you soon, {me}.]";
    let kind = dice.below(8);
    let body: &[&str] = match kind {
        0 => {
            pairs.push(("room", dice.between(1, 399).to_string()));
            pairs.push(("nights", spelled(dice.between(2, 9))));
            pairs.push(("arrival", from_list(dice, "day")));
            pairs.push(("meal", from_list(dice, "dish")));
            &[
                "I would like to stay in room {room} [again|this time], for {nights} nights. I will arrive on {arrival}, [probably late|by train|if the weather allows it]. If it can be done, I would love some {meal} in the evening.",
                "Could I have {meal} when I arrive on {arrival}? I am staying for {nights} nights, and [my friend {n2} told me|everyone says] that room {room} is the [quietest|best].",
                "We are coming on {arrival} and want to stay {nights} nights. Please keep room {room} for us, and [do not forget|remember] the {meal}!",
            ]
        }
        1 => {
            pairs.push((
                "boat",
                scene.raw(
                    dice,
                    "[Heron|Swallow|Otter|Pearl|Gull|Star|Marigold|Juniper]",
                ),
            ));
            pairs.push(("hours", spelled(dice.between(2, 9))));
            pairs.push(("date", date(dice)));
            pairs.push(("people", dice.between(2, 12).to_string()));
            &[
                "Is the {boat} free on {date}? There are {people} of us, and we would need her for {hours} hours[, {n2} included|]. ",
                "I want to hire a boat on {date} for {hours} hours. We are {people} people, [so|and I think] the {boat} would be right.",
                "We had such a good time on the {boat} that we want to come back on {date}: {people} people, {hours} hours, [no children|with {a animal}].",
            ]
        }
        2 => {
            pairs.push(("card", code(dice)));
            pairs.push(("shelf", dice.between(1, 60).to_string()));
            pairs.push(("return date", date(dice)));
            pairs.push((
                "book",
                scene
                    .raw(dice, "The {look} {thing}")
                    .split(' ')
                    .map(capital)
                    .collect::<Vec<_>>()
                    .join(" "),
            ));
            &[
                "I borrowed {book} from shelf {shelf}, and I have to bring it back on {return date}. Could I keep it longer? My card is {card}.",
                "my library card is {card}. I am looking for {book}; {n2} says that it stands on shelf {shelf}. I would return it by {return date}.",
                "{book} was due on {return date}, and I am sorry that it is late. I have put it on shelf {shelf} [myself|again]. The number on my card is {card}.",
            ]
        }
        3 => {
            pairs.push(("instrument", from_list(dice, "instrument")));
            pairs.push(("day", from_list(dice, "day")));
            pairs.push(("time", time(dice)));
            pairs.push(("phone", digits(dice, 5)));
            &[
                "I would like to learn the {instrument}. On {day} I am free from {time}. You can reach me at {phone}.",
                "my {kin} has an old {instrument} and wants lessons. Would {day} at {time} be possible? My number is {phone}.",
                "ring me at {phone}, please! It is about the {instrument} lesson on {day} at {time}: I [will be late|cannot come|am bringing {n2}].",
            ]
        }
        4 => {
            pairs.push(("thing", from_list(dice, "thing")));
            pairs.push(("place", from_list(dice, "place")));
            pairs.push(("colour", from_list(dice, "colour")));
            pairs.push(("phone", digits(dice, 4)));
            &[
                "I have lost my {thing} somewhere near {place}. It is {colour} and [quite old|very dear to me]. If you find it, ring {phone}.",
                "near {place} I have found a {thing}, {colour}, [hardly used|with a scratch|a little wet]. Whoever misses it can ring {phone}.",
                "did anyone bring a {colour} {thing} to you? I must have left it at {place} [on {day}|yesterday]. My number is {phone}.",
            ]
        }
        5 => {
            pairs.push(("seat", dice.between(1, 120).to_string()));
            pairs.push(("train", digits(dice, 3)));
            pairs.push(("town", town(dice)));
            pairs.push(("time", time(dice)));
            &[
                "I am on train {train}, in seat {seat}, and it [is late|has stopped]. Will I still get to {town} by {time}?",
                "keep seat {seat} for me on train {train} to {town}. It leaves at {time}, [I believe|does it not?]",
                "at {time} I got on train {train} to {town} and left my {thing} at seat {seat}. Can you [look for it|help me]?",
            ]
        }
        6 => {
            pairs.push(("vegetable", plural(dice.pick(words::list("vegetable")))));
            pairs.push(("kilos", dice.between(2, 80).to_string()));
            pairs.push(("day", from_list(dice, "day")));
            pairs.push(("street", scene.raw(dice, "{family} [Street|Lane|Road]")));
            &[
                "I need {kilos} kilos of {vegetable} by {day}. Please bring them to {street}, [the green door|second floor|ask for {n2}].",
                "our kitchen in {street} has run out of {vegetable}. Can you deliver {kilos} kilos on {day}?",
                "on {day} we are cooking for the whole street, so I would like {kilos} kilos of {vegetable}. The house is in {street}.",
            ]
        }
        _ => {
            pairs.push(("animal", from_list(dice, "pet")));
            pairs.push(("age", dice.between(2, 19).to_string()));
            pairs.push((
                "trouble",
                scene.raw(
                    dice,
                    "[a cough|a sore paw|no appetite|a cold|a broken tooth|bad dreams]",
                ),
            ));
            pairs.push(("time", time(dice)));
            &[
                "my {animal} has {trouble}, and I am [worried|a little worried]. At {age} years that is no joke. May we come at {time}?",
                "I have {a animal} that is {age} years old and has {trouble}. I could come at {time}.",
                "could the doctor see my {animal} at {time}? It is {age} years old and has had {trouble} [since {day}|for two days].",
            ]
        }
    };
    for (key, value) in &pairs {
        scene.set(key, value);
    }
    let body = dice.pick(body);
    let note = match dice.below(3) {
        0 => scene.say(dice, &format!("{hello}. {body}")),
        1 => scene.say(dice, &format!("{body} {bye}")),
        _ => scene.say(
            dice,
            &format!("[Hello|Good morning|Hi|Good day]! {body} {bye}"),
        ),
    };
    let note = note.trim_start_matches(", ").to_owned();
    let note = capital(&note);
    dice.shuffle(&mut pairs);
    let pairs: Vec<(String, String)> = pairs
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    let many = dice.between(1, 5);
    let (asked, left) = pairs.split_at(many);
    let style = dice.below(STYLES.len());
    let keys: Vec<String> = asked.iter().map(|pair| pair.0.clone()).collect();
    let mut turns = match asked {
        [(key, value)] => {
            let ask = format!(
                "{} {key}{}",
                dice.pick(&["What is the", "Find the", "Tell me the", "Which is the"]),
                dice.pick(&[" in this message?", " in this note?", ", please?"])
            );
            let ask = ask
                .replace("Find the", "Can you find the")
                .replace("Tell me the", "Can you tell me the");
            vec![(format!("{ask}\n\n{note}"), value.clone())]
        }
        _ => vec![(card_request(dice, &note, &keys, style), card(asked, style))],
    };
    if let Some((key, value)) = left.first()
        && dice.chance(40)
    {
        turns.push((format!("And the {key}?"), value.clone()));
    }
    turns
}

/// Small sums in words and in digits.
fn sums(dice: &mut Dice) -> Vec<Turn> {
    (0..dice.between(1, 3))
        .map(|_| {
            let (one, two) = (dice.between(1, 20), dice.between(1, 12));
            let (high, low) = (one.max(two), one.min(two));
            let in_words = dice.chance(50);
            let number = |value: usize| match in_words {
                true => spelled(value),
                false => value.to_string(),
            };
            let (ask, result) = match dice.below(5) {
                0 | 1 => (format!("{} plus {}", number(one), number(two)), one + two),
                2 | 3 => (
                    format!("{} minus {}", number(high), number(low)),
                    high - low,
                ),
                _ => {
                    let (one, two) = (dice.between(2, 10), dice.between(2, 10));
                    (format!("{} times {}", number(one), number(two)), one * two)
                }
            };
            let start = dice.pick(&["What is", "How much is", "Tell me:", "Please work out"]);
            let end = if start.starts_with(['W', 'H']) {
                "?"
            } else {
                "."
            };
            let answer = match dice.chance(60) {
                true => tidy(&format!("{ask} is {}.", number(result))),
                false => capital(&number(result)),
            };
            (format!("{start} {ask}{end}"), answer)
        })
        .collect()
}

/// Rearranging and repeating a list.
fn lists(dice: &mut Dice) -> Vec<Turn> {
    let count = dice.between(3, 6);
    let pools: [&[&str]; 6] = [
        words::WOMEN,
        words::MEN,
        words::THINGS,
        words::list("animal"),
        words::list("fruit"),
        words::list("town end"),
    ];
    let items: Vec<String> = match dice.below(7) {
        6 => (0..count).map(|_| code(dice)).collect(),
        5 => (0..count).map(|_| town(dice)).collect(),
        pool => dice
            .sample(pools[pool], count)
            .into_iter()
            .map(str::to_owned)
            .collect(),
    };
    let list = items.join(", ");
    let mut turns = Vec::new();
    for at in 0..dice.between(1, 3) {
        let (ask, answer) = match dice.below(9) {
            0 => ("[Repeat|Copy|Write down] the list", list.clone()),
            1 => {
                let back: Vec<String> = items.iter().rev().cloned().collect();
                (
                    "[Turn the list around|Write the list backwards|Reverse the list]",
                    back.join(", "),
                )
            }
            2 => {
                let mut sorted = items.clone();
                sorted.sort_unstable();
                (
                    "[Sort the list|Sort the list by the alphabet|Arrange the list alphabetically]",
                    sorted.join(", "),
                )
            }
            3 => ("What comes [first|at the beginning]", items[0].clone()),
            4 => ("What comes [last|at the end]", items[count - 1].clone()),
            5 => ("What comes [second|after the first]", items[1].clone()),
            6 => (
                "How many [items|entries] are there",
                capital(&spelled(count)),
            ),
            7 => (
                "Write the list with \"and\" before the last",
                joined(&items),
            ),
            _ => {
                let lines: Vec<String> = items
                    .iter()
                    .zip(1..)
                    .map(|(item, at)| format!("{at}. {item}"))
                    .collect();
                ("[Number|Count] the list", lines.join("\n"))
            }
        };
        let ask = Scene::default().say(dice, ask);
        let end = if ask.starts_with(['H', 'W']) && !ask.starts_with("Wr") {
            '?'
        } else {
            '.'
        };
        turns.push(match at {
            0 => match dice.chance(50) {
                true => (
                    format!("{ask}{} {list}", if end == '.' { ':' } else { '?' }),
                    answer,
                ),
                false => (format!("Here is a list: {list}. {ask}{end}"), answer),
            },
            _ => (format!("{ask}{end}"), answer),
        });
    }
    turns
}

/// Spelling words and codes, and putting them back together.
fn spelling(dice: &mut Dice) -> Vec<Turn> {
    (0..dice.between(1, 3))
        .map(|_| {
            let text = match dice.below(5) {
                0 => code(dice),
                1 => town(dice),
                2 => Person::draw(dice).first,
                3 => digits(dice, 4),
                _ => dice.pick(words::THINGS).replace(' ', ""),
            };
            let letters: Vec<String> = text
                .chars()
                .map(|c| match c {
                    '-' => "dash".to_owned(),
                    c => c.to_uppercase().collect(),
                })
                .collect();
            let spelled_out = letters.join(", ");
            match dice.below(3) {
                0 => (
                    format!("What does this spell? {spelled_out}"),
                    text.to_uppercase(),
                ),
                1 => (format!("How many letters or digits are in {text}?"), {
                    let many = text.chars().filter(|c| c.is_alphanumeric()).count();
                    capital(&spelled(many))
                }),
                _ => {
                    let ask =
                        dice.pick(&["Spell", "Please spell", "Read this out, letter by letter:"]);
                    (format!("{ask} {text}."), spelled_out)
                }
            }
        })
        .collect()
}

/// What kind of thing something is.
fn kinds(dice: &mut Dice) -> Vec<Turn> {
    const KINDS: &[(&str, &str)] = &[
        ("bird", "bird"),
        ("fruit", "fruit"),
        ("vegetable", "vegetable"),
        ("tool", "tool"),
        ("instrument", "instrument"),
        ("colour", "colour"),
        ("day", "day of the week"),
        ("month", "month"),
        ("season", "season"),
        ("job", "job"),
        ("material", "material"),
        ("dish", "meal"),
        ("room", "room"),
    ];
    (0..dice.between(1, 3))
        .map(|_| {
            let some = dice.sample(KINDS, 3);
            let (list, kind) = some[0];
            let item = from_list(dice, list);
            let mut options = some.clone();
            options.sort_unstable();
            let options: Vec<String> = options.iter().map(|(_, kind)| with_article(kind)).collect();
            match dice.below(4) {
                0 => (
                    format!(
                        "Is \"{item}\" {}, {} or {}?",
                        options[0], options[1], options[2]
                    ),
                    capital(&with_article(kind)),
                ),
                1 => (
                    format!("What kind of thing is \"{item}\"?"),
                    format!("It is {}.", with_article(kind)),
                ),
                2 => {
                    let mut words: Vec<(String, &str)> = Vec::new();
                    for _ in 0..4 {
                        let (list, kind) = some[dice.below(2)];
                        words.push((from_list(dice, list), kind));
                    }
                    let ask: Vec<&str> = words.iter().map(|word| word.0.as_str()).collect();
                    let answer: Vec<String> = words
                        .iter()
                        .map(|(word, kind)| format!("{word} ({kind})"))
                        .collect();
                    (
                        format!("Say for each what it is: {}", ask.join(", ")),
                        answer.join(", "),
                    )
                }
                _ => {
                    let other = from_list(dice, some[1].0);
                    let mut both = [item.clone(), other];
                    dice.shuffle(&mut both);
                    let [one, two] = both;
                    (
                        format!("Which of these is {}: {one} or {two}?", with_article(kind)),
                        capital(&item),
                    )
                }
            }
        })
        .collect()
}

/// Changing the form of words and sentences.
fn forms(dice: &mut Dice) -> Vec<Turn> {
    const OPPOSITES: &[(&str, &str)] = &[
        ("big", "small"),
        ("long", "short"),
        ("old", "new"),
        ("warm", "cold"),
        ("heavy", "light"),
        ("thick", "thin"),
        ("early", "late"),
        ("open", "closed"),
        ("full", "empty"),
        ("near", "far"),
        ("loud", "quiet"),
        ("fast", "slow"),
        ("dry", "wet"),
        ("happy", "sad"),
        ("first", "last"),
        ("high", "low"),
        ("wide", "narrow"),
        ("strong", "weak"),
        ("clean", "dirty"),
        ("bright", "dark"),
    ];
    const VERBS: &[(&str, &str)] = &[
        ("goes to", "went to"),
        ("sees", "saw"),
        ("finds", "found"),
        ("sells", "sold"),
        ("brings", "brought"),
        ("takes", "took"),
        ("likes", "liked"),
        ("draws", "drew"),
        ("forgets", "forgot"),
        ("paints", "painted"),
        ("leaves", "left"),
        ("knows", "knew"),
    ];
    (0..dice.between(1, 3))
        .map(|_| {
            let mut scene = Scene::default();
            let person = Person::draw(dice);
            person.bind(&mut scene, 1);
            scene.draw(dice, "thing1", "thing");
            scene.draw(dice, "colour1", "colour");
            scene.draw(dice, "place1", "place");
            match dice.below(6) {
                0 => {
                    let noun = scene.raw(dice, "{thing1}");
                    (format!("What is the plural of \"{noun}\"?"), plural(&noun))
                }
                1 => {
                    let (one, two) = dice.choose(OPPOSITES);
                    let (one, two) = if dice.chance(50) {
                        (one, two)
                    } else {
                        (two, one)
                    };
                    (
                        format!("What is the opposite of \"{one}\"?"),
                        (*two).to_owned(),
                    )
                }
                2 => {
                    let (now, then) = dice.choose(VERBS);
                    let what = match now.ends_with("to") {
                        true => scene.raw(dice, "{place1}"),
                        false => scene.raw(dice, "the {colour1} {thing1}"),
                    };
                    let (name, ask) = (&person.first, "Put this into the past:");
                    (
                        format!("{ask} {name} {now} {what}."),
                        format!("{name} {then} {what}."),
                    )
                }
                3 => {
                    let other = Person::draw(dice);
                    let line = scene.raw(dice, "the {colour1} {thing1} {spot} belongs to");
                    let ask = format!(
                        "Write {} in place of {}: {line} {}.",
                        other.first, person.first, person.first
                    );
                    (ask, format!("{} {}.", capital(&line), other.first))
                }
                4 => {
                    let other = dice.pick(words::list("colour"));
                    let before = scene.raw(dice, "{n1} left the {colour1} {thing1} at {place1}.");
                    scene.set("colour1", other);
                    let after = scene.raw(dice, "{n1} left the {colour1} {thing1} at {place1}.");
                    (format!("Make it {other}: {before}"), after)
                }
                _ => {
                    let line = scene.raw(dice, "{n1} [has|wants|needs] {a colour1} {thing1}");
                    (format!("Make a question of this: {line}."), {
                        let line = line
                            .replacen(" has ", " have ", 1)
                            .replacen(" wants ", " want ", 1)
                            .replacen(" needs ", " need ", 1);
                        format!("Does {line}?")
                    })
                }
            }
        })
        .collect()
}

/// Questions on who has how many.
fn holdings(dice: &mut Dice) -> Vec<Turn> {
    let (text, _, mut questions) = prose::trade(dice);
    dice.shuffle(&mut questions);
    questions.truncate(dice.between(1, 3));
    questions[0].0 = format!("{text} {}", questions[0].0);
    questions
}

/// Rules that are given, then used.
fn rules(dice: &mut Dice) -> Vec<Turn> {
    let name = Person::draw(dice).first;
    let (list, result, form) = *dice.choose(&[
        ("day", "dish", "on {k} there is {r}"),
        ("animal", "room", "the {k} sleeps in the {r}"),
        ("job", "thing", "{a k} gets {a r}"),
        ("colour", "place", "whoever has {a k} ticket goes to {r}"),
    ]);
    let keys = dice.sample(words::list(list), 3);
    let results = dice.sample(words::list(result), 3);
    let mut scene = Scene::default();
    let lines: Vec<String> = keys
        .iter()
        .zip(&results)
        .map(|(key, result)| {
            scene.set("k", *key);
            scene.set("r", *result);
            scene.raw(dice, form)
        })
        .collect();
    let at = dice.below(3);
    let (key, value) = (keys[at], results[at]);
    let (ask, answer) = match list {
        "day" => (
            format!("It is {key}. What is there to eat?"),
            capital(value),
        ),
        "animal" => (
            format!("Where does the {key} sleep?"),
            format!("In the {value}."),
        ),
        "job" => (
            format!("{name} is {}. What does {name} get?", with_article(key)),
            capital(&with_article(value)),
        ),
        _ => (
            format!(
                "{name} has {} ticket. Where should {name} go?",
                with_article(key)
            ),
            format!("To {value}."),
        ),
    };
    let start = dice.pick(&[
        "The rule is this:",
        "Rules:",
        "Here is how it works:",
        "Remember:",
    ]);
    vec![(format!("{start} {}. {ask}", joined(&lines)), answer)]
}

/// Hearing a mood in a sentence.
fn moods(dice: &mut Dice) -> Vec<Turn> {
    const MOODS: &[(&str, &[&str])] = &[
        (
            "happy",
            &[
                "I could sing all day",
                "what a wonderful {day} this has been",
                "everything went better than I had hoped",
                "I have not laughed so much in years",
                "the {thing} is exactly what I wished for",
                "{n1} came back, and the whole house is full of music",
            ],
        ),
        (
            "sad",
            &[
                "I miss {n1} so much",
                "the house is empty without my {pet}",
                "nobody remembered my birthday",
                "I looked at the old {thing} and had to cry",
                "it is all over now",
                "nothing is as it was before",
            ],
        ),
        (
            "angry",
            &[
                "how dare {n1} take my {thing} again",
                "this is the third time, and I have had enough",
                "I slammed the door behind me",
                "nobody here ever listens to me",
                "I never want to see that {thing} again",
                "somebody will have to pay for this",
            ],
        ),
        (
            "afraid",
            &[
                "something is moving {spot}",
                "I do not dare to open the door",
                "my hands will not stop shaking",
                "please do not leave me alone in the {room}",
                "what if {n1} does not come back",
                "I heard steps, and there was nobody there",
            ],
        ),
        (
            "tired",
            &[
                "I can hardly keep my eyes open",
                "I have not slept since {day}",
                "one more step and I will fall over",
                "all I want is my bed",
                "I fell asleep over the {thing}",
                "after this week I could sleep until {month}",
            ],
        ),
        (
            "proud",
            &[
                "I made the {thing} all by myself",
                "{n1} won first prize, and I taught {him1} everything",
                "nobody thought that I could do it, and I did",
                "you should see my {thing} now",
                "after a whole year I can play the {instrument}",
                "they put my picture in the town hall",
            ],
        ),
    ];
    (0..dice.between(1, 3))
        .map(|_| {
            let (scene, _) = cast(dice, 1);
            let (mood, lines) = dice.choose(MOODS);
            let line = dice.pick(lines);
            let said = scene.say(dice, &format!("{line}[.|!]"));
            let line = dice.pick(lines);
            let more = match dice.chance(40) {
                true => format!(" {}", scene.say(dice, &format!("{line}."))),
                false => String::new(),
            };
            let said = format!("\"{said}{more}\"");
            let mut others: Vec<&str> = dice
                .sample(MOODS, 6)
                .into_iter()
                .map(|other| other.0)
                .filter(|other| other != mood)
                .collect();
            others.truncate(2);
            others.push(mood);
            dice.shuffle(&mut others);
            let options = format!("{}, {} or {}", others[0], others[1], others[2]);
            match dice.below(3) {
                0 => (
                    format!("How does the writer feel: {options}? {said}"),
                    capital(mood),
                ),
                1 => (
                    format!("{said} Does this sound {options}?"),
                    format!("It sounds {mood}."),
                ),
                _ => (
                    format!("In one word, how does this person feel? {said}"),
                    capital(mood),
                ),
            }
        })
        .collect()
}

/// Requests for a story, a letter or a recipe.
fn writing(dice: &mut Dice) -> Vec<Turn> {
    let people = Person::draw_some(dice, 2);
    let thing = dice.pick(words::THINGS);
    let (one, two) = (&people[0].first, &people[1].first);
    match dice.below(4) {
        0 | 1 => {
            let ask = match dice.below(3) {
                0 => format!("Tell me a story about {one} and {}.", with_article(thing)),
                1 => format!(
                    "Please write a short story with {} in it. The hero is {one}.",
                    with_article(thing)
                ),
                _ => format!(
                    "I would like to hear a story about {}. Call the hero {one}.",
                    with_article(thing)
                ),
            };
            vec![(ask, prose::tale(dice, Some(&people[0]), Some(thing)))]
        }
        2 => {
            let ask = match dice.chance(50) {
                true => format!(
                    "Write a letter from {one} to {two} about {}.",
                    with_article(thing)
                ),
                false => format!("{one} wants to write to {two} about the {thing}. Can you help?"),
            };
            vec![(
                ask,
                prose::letter_from(dice, &people[0], &people[1], Some(thing)),
            )]
        }
        _ => vec![(
            dice.pick(&[
                "Can you give me a recipe?",
                "What could I cook today?",
                "I am hungry. Do you know a recipe?",
            ])
            .to_owned(),
            prose::recipe(dice),
        )],
    }
}

/// Greetings and questions about the assistant.
fn pleasantries(dice: &mut Dice) -> Vec<Turn> {
    let (scene, _) = cast(dice, 1);
    let mut turns = vec![match dice.chance(50) {
        true => (
            scene.say(dice, "[Hello|Hi|Good morning|Good evening]! [My name is {n1}|I am {n1}|{n1} here]."),
            scene.say(dice, "[Hello|Good to meet you|Welcome], {n1}! [How can I help you?|What can I do for you?]"),
        ),
        false => (
            scene.say(dice, "[Hello|Hi|Good morning|Good evening]!"),
            scene.say(dice, "Hello! [How can I help you?|What can I do for you?]"),
        ),
    }];
    let more = [
        (
            "Who are you?",
            "I am a small language model. I was trained in half an hour, so please be patient with me.",
        ),
        (
            "What can you do?",
            "I can tell stories, answer questions about a text, sort lists and do small sums.",
        ),
        ("How are you?", "I am well, thank you. And you?"),
        (
            "Do you know everything?",
            "No, I know very little. But I can read what you give me.",
        ),
        ("Are you a person?", "No, I am a small language model."),
        (
            "What is your name?",
            "I have no name yet. You may give me one.",
        ),
        ("Thank you!", "You are welcome!"),
    ];
    for (ask, answer) in dice.sample(&more, 2) {
        turns.push((ask.to_owned(), answer.to_owned()));
    }
    if dice.chance(40) {
        let many = dice.between(2, 12);
        let noun = dice.pick(words::THINGS);
        let some = counted(&figure(dice, many), many, noun);
        turns.push((
            format!("I have {some}."),
            format!(
                "{} make a good number. What do you do with them?",
                capital(&some)
            ),
        ));
    }
    if dice.chance(50) {
        let bye = dice.pick(&["Goodbye!", "Good night!", "See you soon!"]);
        turns.push((
            bye.to_owned(),
            scene.say(
                dice,
                &format!("{bye} [Come back any time.|It was a pleasure.]"),
            ),
        ));
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dice::Stream;

    #[test]
    fn a_card_keeps_the_order_of_its_keys() {
        let pairs = [
            ("town".to_owned(), "Elmford".to_owned()),
            ("age".to_owned(), "7".to_owned()),
        ];
        assert_eq!(card(&pairs, 0), "town: Elmford\nage: 7");
        assert_eq!(card(&pairs, 4), "Elmford, 7");
    }

    #[test]
    fn every_exercise_ends() {
        for index in 0..2000 {
            let talk = any(&mut Dice::new(3, Stream::Base, index));
            assert!(!talk.turns.is_empty(), "document {index} is empty");
        }
    }
}
