//! People, places and figures that a text is about.

use crate::dice::Dice;
use crate::grammar::Scene;
use crate::words;

/// Someone with a name and the pronouns that go with it.
#[derive(Clone, PartialEq)]
pub(crate) struct Person {
    /// The first name.
    pub(crate) first: String,
    /// The family name.
    pub(crate) family: String,
    she: bool,
}

impl Person {
    /// Anyone at all.
    pub(crate) fn draw(dice: &mut Dice) -> Self {
        let she = dice.chance(50);
        let first = dice
            .pick(if she { words::WOMEN } else { words::MEN })
            .to_owned();
        let family = Scene::default().raw(dice, "{family}");
        Self { first, family, she }
    }

    /// `count` people of different first names.
    pub(crate) fn draw_some(dice: &mut Dice, count: usize) -> Vec<Self> {
        let mut people = Vec::new();
        Self::join(dice, &mut people, count);
        people
    }

    /// Adds to `people` until there are `count` of different first names.
    pub(crate) fn join(dice: &mut Dice, people: &mut Vec<Self>, count: usize) {
        while people.len() < count {
            let person = Self::draw(dice);
            if people.iter().all(|other| other.first != person.first) {
                people.push(person);
            }
        }
    }

    /// The first name and the family name.
    pub(crate) fn full(&self) -> String {
        format!("{} {}", self.first, self.family)
    }

    /// Binds the name and the pronouns, with `number` behind each:
    /// `n1` the first name, `f1` the full name, and `he1`, `him1`, `his1`,
    /// `hers1`, `himself1`, `boy1`, `man1`, whatever the person is.
    pub(crate) fn bind(&self, scene: &mut Scene, number: usize) {
        let pronouns = match self.she {
            true => ["she", "her", "her", "hers", "herself", "girl", "woman"],
            false => ["he", "him", "his", "his", "himself", "boy", "man"],
        };
        let names = ["he", "him", "his", "hers", "himself", "boy", "man"];
        for (name, pronoun) in names.iter().zip(pronouns) {
            scene.set(&format!("{name}{number}"), pronoun);
        }
        scene.set(&format!("n{number}"), &self.first);
        scene.set(&format!("f{number}"), self.full());
    }
}

/// A scene with `count` people bound in it.
pub(crate) fn cast(dice: &mut Dice, count: usize) -> (Scene, Vec<Person>) {
    let people = Person::draw_some(dice, count);
    let mut scene = Scene::default();
    bind(&people, &mut scene);
    (scene, people)
}

/// Binds `people` as number one and onwards.
pub(crate) fn bind(people: &[Person], scene: &mut Scene) {
    for (at, person) in people.iter().enumerate() {
        person.bind(scene, at + 1);
    }
}

/// The name of a town.
pub(crate) fn town(dice: &mut Dice) -> String {
    loop {
        let start = dice.pick(words::list("town start"));
        let end = dice.pick(words::list("town end"));
        if !start.to_lowercase().ends_with(end) {
            return format!("{start}{end}");
        }
    }
}

/// A date such as "14 May", "May 14" or "the 14th of May".
pub(crate) fn date(dice: &mut Dice) -> String {
    let (day, month) = (dice.between(1, 28), dice.pick(words::list("month")));
    match dice.below(3) {
        0 => format!("{day} {month}"),
        1 => format!("{month} {day}"),
        _ => format!("the {} of {month}", words::ordinal(day)),
    }
}

/// A time such as "half past nine" or "7:15".
pub(crate) fn time(dice: &mut Dice) -> String {
    match dice.chance(50) {
        true => Scene::default().raw(dice, "{clock}"),
        false => {
            let (hour, quarter) = (dice.between(5, 22), dice.below(12));
            format!("{hour}:{:02}", quarter * 5)
        }
    }
}

/// A number of `digits` digits that does not begin with zero.
pub(crate) fn digits(dice: &mut Dice, digits: u32) -> String {
    let low = 10_usize.pow(digits - 1);
    dice.between(low, low * 10 - 1).to_string()
}

/// A code of letters and digits such as "A7-204".
pub(crate) fn code(dice: &mut Dice) -> String {
    let mut letter = || char::from(b'A' + dice.below(26) as u8);
    let (one, two) = (letter(), letter());
    match dice.below(5) {
        0 => format!("{one}{}-{}", dice.below(10), digits(dice, 3)),
        1 => format!("{one}{two}-{}", digits(dice, 4)),
        2 => format!("{}-{one}", digits(dice, 3)),
        3 => format!("{one}{}", digits(dice, 3)),
        _ => format!("{one}{two}{}", digits(dice, 3)),
    }
}

/// `number` in digits or in words.
pub(crate) fn figure(dice: &mut Dice, number: usize) -> String {
    match dice.chance(60) {
        true => words::spelled(number),
        false => number.to_string(),
    }
}
