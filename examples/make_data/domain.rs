//! The domain: support tickets of a mail-order shop and the desk's replies.

use std::collections::BTreeSet;

use crate::dice::{Dice, Stream};
use crate::grammar::Scene;
use crate::words;

/// A ticket with the reply that the rules of the house give it.
pub(crate) struct Ticket {
    /// What the customer wrote.
    pub(crate) text: String,
    /// The desk's structured reply.
    pub(crate) reply: String,
    name: &'static str,
    order: usize,
    wording: (usize, usize, usize, &'static str),
}

/// What a customer can write about, with the wordings for it, what may be
/// wished for, and what the desk does at high, normal and low priority.
struct Category {
    label: &'static str,
    problems: &'static [&'static str],
    wishes: &'static [&'static str],
    actions: [&'static str; 3],
}

const CATEGORIES: &[Category] = &[
    Category {
        label: "damage",
        problems: &[
            "[The {product}|It] arrived with a [long|deep] crack [in it|on one side].",
            "[The {product}|It] came out of the box in [two|three] pieces.",
            "[The {product}|It] is [bent and scratched|scratched all over].",
            "There is a big dent in the {product}.",
            "One corner of the {product} is chipped.",
            "The box was crushed, and so was the {product}.",
            "When I unpacked the {product}, it was already broken.",
            "[The {product}|It] fell apart the first time I used it.",
        ],
        wishes: &[
            "Please send me a new one.",
            "Could you replace it?",
            "I would like one that is whole.",
        ],
        actions: ["express replacement", "send replacement", "offer repair"],
    },
    Category {
        label: "delay",
        problems: &[
            "[The {product}|It] has [still|] not arrived.",
            "I am still waiting for the {product}.",
            "[The {product}|It] should have been here [last week|ten days ago].",
            "The parcel [with the {product}|] seems to be lost.",
            "You promised it for {day}, and nobody came.",
            "The tracking page has not changed for days.",
            "Nothing has been delivered so far.",
            "The carrier says that he never saw the parcel.",
        ],
        wishes: &[
            "Where is it?",
            "Can you find out where it is?",
            "Please tell me when it will come.",
        ],
        actions: ["call carrier", "trace parcel", "send update"],
    },
    Category {
        label: "mixup",
        problems: &[
            "You sent me {a other} instead.",
            "There was {a other} in the box.",
            "What I unpacked was {a other}.",
            "Somebody packed {a other} by mistake.",
            "I was given {a other}, which I never asked for.",
            "The label was right, but inside was {a other}.",
            "This must be somebody else's parcel: I found {a other}.",
            "[The {product}|It] is [red|blue|green], but I had chosen [white|black|yellow].",
        ],
        wishes: &[
            "I want what I paid for.",
            "Could we swap it?",
            "Please send the right one.",
        ],
        actions: ["express exchange", "send exchange", "send label"],
    },
    Category {
        label: "parts",
        problems: &[
            "There were no screws in the box.",
            "The lid [of the {product}|] is missing.",
            "One of the feet was not in the parcel.",
            "I cannot find the handle [anywhere|in the box].",
            "The bag with the small parts was left out.",
            "[The {product}|It] came without its [cable|cover|strap].",
            "Half of the parts are not there.",
            "A hook is missing, so I cannot put it up.",
        ],
        wishes: &[
            "Can you send what is missing?",
            "Please mail it to me.",
            "I only need that one piece.",
        ],
        actions: ["courier parts", "mail parts", "mail parts"],
    },
    Category {
        label: "billing",
        problems: &[
            "I was charged twice for the {product}.",
            "The price on the bill is higher than in your shop.",
            "You took [eight|twelve|thirty] crowns too much from my account.",
            "My discount was forgotten.",
            "The sum on the invoice is wrong.",
            "I have already paid, but I got a second bill.",
            "You charged me for express delivery, which I did not choose.",
            "The {product} was on sale, yet I paid the full price.",
        ],
        wishes: &[
            "Please check it.",
            "I would like the money back.",
            "Can you put that right?",
        ],
        actions: ["call customer", "correct invoice", "correct invoice"],
    },
    Category {
        label: "return",
        problems: &[
            "[The {product}|It] is too [big|small|heavy] for my [kitchen|hall|flat].",
            "I have changed my mind.",
            "I no longer need the {product}.",
            "My [sister|uncle|neighbour] gave me the same one.",
            "[The {product}|It] does not go with my other things.",
            "It looked nicer in the catalogue.",
            "I ordered one too many.",
            "My [husband|wife|daughter] does not like the {product}.",
        ],
        wishes: &[
            "May I give it back?",
            "I would like to return it.",
            "How can I send it back?",
        ],
        actions: ["arrange pickup", "send label", "send label"],
    },
    Category {
        label: "advice",
        problems: &[
            "How do I clean the {product}?",
            "I cannot work out how to [open|fold|fasten] it.",
            "May the {product} stand outside in the rain?",
            "I do not understand the instructions [for the {product}|].",
            "Which oil should I use for the {product}?",
            "How long will the {product} last if I use it every day?",
            "Is the {product} safe for children?",
            "I would like to know what the {product} is made of.",
        ],
        wishes: &[
            "Please explain it to me.",
            "A short hint would be enough.",
            "Can you tell me more?",
        ],
        actions: ["call customer", "email guide", "email guide"],
    },
];

const PRIORITIES: &[(&str, &[&str])] = &[
    (
        "high",
        &[
            "This is urgent.",
            "I need an answer today.",
            "Please hurry.",
            "My guests arrive tomorrow.",
            "I cannot wait any longer.",
            "It is for a wedding on {day}.",
            "Every hour counts.",
            "Please reply at once.",
        ],
    ),
    (
        "normal",
        &[
            "Please let me know this week.",
            "I hope to hear from you soon.",
            "A reply in the next few days would be good.",
            "Please write back when you have looked into it.",
            "I look forward to your answer.",
            "I would be glad of an answer by {day}.",
            "",
            "",
        ],
    ),
    (
        "low",
        &[
            "There is no hurry.",
            "Take your time.",
            "It can wait.",
            "This is not urgent.",
            "Whenever you find a moment is fine.",
            "Next month is early enough.",
            "I do not mind waiting.",
            "Please do the important things first.",
        ],
    ),
];

const PRODUCTS: &[&str] = &[
    "armchair",
    "backpack",
    "basket",
    "bench",
    "bicycle",
    "blanket",
    "bookcase",
    "bowl",
    "carpet",
    "chair",
    "coffee grinder",
    "cushion",
    "desk lamp",
    "fan",
    "garden hose",
    "hammock",
    "heater",
    "kettle",
    "ladder",
    "lantern",
    "mirror",
    "mixer",
    "oil lamp",
    "pan",
    "parasol",
    "radio",
    "rug",
    "saucepan",
    "shelf",
    "stool",
    "suitcase",
    "table",
    "teapot",
    "telescope",
    "tent",
    "toaster",
    "umbrella",
    "vase",
    "wall clock",
    "watering can",
];

const OPENINGS: &[&str] = &[
    "[Hello|Good morning|Good day], [this is {name}|my name is {name}|{name} here]. [I am writing about|It is about] my {product}, order {order}.",
    "[Hello|Hi|Good evening], {name} here. [On {day}|Last week|In {month}] I ordered {a product}, number {order}.",
    "I bought {a product} [from you|in your shop|for my {kin}], order {order}.",
    "Order {order}, {a product}[, bought in {month}|].",
    "[My order number is|The number is] {order}, and it is about {a product}.",
    "[On {day}|Last week|In {month}] I ordered {a product} from you (order {order}).",
];

const DETAILS: &[&str] = &[
    "I have been your customer for years.",
    "Your shop was [always|] recommended to me by my {kin}.",
    "The driver was very friendly, by the way.",
    "Otherwise I am very happy with your shop.",
    "It was meant as a present for my {kin}.",
    "I have told my {kin} about it, too.",
    "I tried to ring you on {day}.",
    "We had been looking forward to it.",
];

const CLOSINGS: &[&str] = &[
    "[Thank you|Thanks|Many thanks], {name}",
    "[Best wishes|Kind regards|Yours], {name}",
    "[Greetings|Best regards] from {name}",
];

/// Names that only the evaluation's customers have: every sixth one.
fn names(evaluation: bool) -> Vec<&'static str> {
    let all = words::WOMEN.iter().chain(words::MEN).copied().zip(0..);
    all.filter(|(_, at)| (at % 6 == 5) == evaluation)
        .map(|(name, _)| name)
        .collect()
}

impl Ticket {
    fn draw(dice: &mut Dice, names: &[&'static str]) -> Self {
        let mut scene = Scene::default();
        let category = dice.below(CATEGORIES.len());
        let level = dice.below(PRIORITIES.len());
        let Category {
            label,
            problems,
            wishes,
            actions,
        } = &CATEGORIES[category];
        let (priority, urgencies) = PRIORITIES[level];
        let name = *dice.choose(names);
        let both = dice.sample(PRODUCTS, 2);
        let (product, order) = (both[0], dice.between(1000, 9999));
        scene.set("name", name);
        scene.set("product", product);
        scene.set("other", both[1]);
        scene.set("order", order.to_string());

        let opening = dice.pick(OPENINGS);
        let problem = dice.below(problems.len());
        let urgency = dice.below(urgencies.len());
        let mut lines = vec![problems[problem]];
        if dice.chance(30) {
            lines.push(dice.pick(DETAILS));
        }
        let mut ends = vec![urgencies[urgency]];
        if dice.chance(60) {
            ends.push(dice.pick(wishes));
        }
        dice.shuffle(&mut ends);
        lines.extend(ends);
        // Whoever signs at the end need not have said who is writing.
        match opening.contains("{name}") {
            true => lines.insert(0, opening),
            false => {
                lines.insert(if dice.chance(80) { 0 } else { 1 }, opening);
                lines.push(dice.pick(CLOSINGS));
            }
        }
        let reply = format!(
            "category: {label} | priority: {priority} | action: {}",
            actions[level]
        );
        Self {
            text: scene.say(dice, &lines.join(" ")),
            reply,
            name,
            order,
            wording: (category, problem, level * 8 + urgency, product),
        }
    }
}

/// The two splits. No ticket, order number, customer's name or combination of
/// problem, urgency and product of the evaluation occurs in training.
pub(crate) fn splits(seed: u64, train: usize, eval: usize) -> (Vec<Ticket>, Vec<Ticket>) {
    let mut dice = Dice::new(seed, Stream::Domain, 0);
    let mut orders = BTreeSet::new();
    let mut texts = BTreeSet::new();
    let mut draw = |count: usize, evaluation: bool, taken: &BTreeSet<_>| {
        let names = names(evaluation);
        let mut tickets = Vec::new();
        while tickets.len() < count {
            let ticket = Ticket::draw(&mut dice, &names);
            let words = ticket.text.split_whitespace().count();
            if (18..=60).contains(&words)
                && !taken.contains(&ticket.wording)
                && orders.insert(ticket.order)
                && texts.insert(ticket.text.clone())
            {
                tickets.push(ticket);
            }
        }
        tickets
    };
    let train = draw(train, false, &BTreeSet::new());
    let seen = train.iter().map(|ticket| ticket.wording).collect();
    let eval = draw(eval, true, &seen);

    for ticket in &eval {
        let clash = train.iter().any(|other| {
            other.text == ticket.text || other.order == ticket.order || other.name == ticket.name
        });
        assert!(
            !clash,
            "a ticket of the evaluation occurs in training: {}",
            ticket.text
        );
    }
    (train, eval)
}

/// The description that goes with the data.
pub(crate) fn readme(train: &[Ticket], eval: &[Ticket]) -> String {
    let labels: Vec<&str> = CATEGORIES.iter().map(|category| category.label).collect();
    let rules: String = CATEGORIES
        .iter()
        .map(|category| {
            let [high, normal, low] = category.actions;
            format!("| {} | {high} | {normal} | {low} |\n", category.label)
        })
        .collect();
    format!(
        "# Support tickets of Lanternway

Lanternway is a mail-order shop for house and garden that does not exist. Its
customers write in their own words; its support desk answers every ticket with
one line of three fields:

```text
{text}

{reply}
```

- `category` is one of {labels}: what the problem is.
- `priority` is `high`, `normal` or `low`, by how the customer puts it; without
  a word on it, `normal`.
- `action` follows from category and priority, whatever the customer wishes:

| category | high | normal | low |
| --- | --- | --- | --- |
{rules}
`train.jsonl` holds {train} tickets and `eval.jsonl` holds {eval}, one record per
line: `{{\"messages\": [{{\"role\": \"user\", …}}, {{\"role\": \"assistant\", …}}]}}`. In the
evaluation, no customer's name, no order number and no combination of problem,
urgency and product is one of training; the single wordings are known.

**The measure is exact match**: the share of evaluation tickets to which the
model's whole reply, decoded greedily and without white space at either end,
equals the reference. One wrong word in any of the three fields makes the reply
wrong.

All of it is made up by `cargo run --release --example make_data`, from word
lists and wordings in `examples/make_data/domain.rs`; the same seed gives the
same bytes.
",
        text = eval[0].text,
        reply = eval[0].reply,
        labels = labels
            .iter()
            .map(|label| format!("`{label}`"))
            .collect::<Vec<_>>()
            .join(", "),
        train = train.len(),
        eval = eval.len(),
    )
}
