//! Short explanations of everyday matters: where the wider vocabulary lives.

use crate::dice::Dice;
use crate::grammar::plural;
use crate::words;
use crate::world::{cast, digits, town};

/// A matter to explain: its openings and what there is to say about it.
type Topic = (&'static [&'static str], &'static [&'static str]);

const TOPICS: &[Topic] = &[
    (
        &[
            "The post office of {home} is [older|smaller|busier] than it looks.",
            "How does a parcel get from {home} to {away}?",
            "{f1} has been working at the post office of {home} for {years} years.",
        ],
        &[
            "Every parcel gets a label, and every label has a number, so that nothing is lost.",
            "A carrier brings the parcels to the station, where they are sorted by town and by weight.",
            "Express letters travel [by the first train|at night], and the sender pays double.",
            "If nobody opens the door, the carrier leaves a card and tries again on {day}.",
            "A parcel without an address is opened by {n2}, who has seen [everything|stranger things], even {a animal} made of {material}.",
            "One can follow a parcel on its way: each office writes down the hour at which it arrived.",
            "Sometimes a box is crushed or wet, and then its contents must be checked in front of a witness.",
            "What is delivered too late is delivered with an apology.",
            "Courier riders used to carry the mail across the hills, {look} bags over their shoulders.",
        ],
    ),
    (
        &[
            "A good shop is more than a room full of products.",
            "What makes a shop good? {f1} from {home} has thought about it for {years} years.",
            "People in {home} like to argue about prices.",
        ],
        &[
            "The first rule is that the customer may ask anything, even the same thing twice.",
            "Each product belongs to a category, lamps with lamps, pots with pots.",
            "The price is written on a card, and a discount is given only to [neighbours|those who ask politely].",
            "An honest bill lists every item, its price and the total sum.",
            "A customer who wants to exchange something needs patience and the receipt.",
            "It is better to repair {a thing} than to throw it away.",
            "The order of the shelves is never an accident: bread at the back, sweets at the front.",
            "In the evening {n1} counts the money, writes the invoices and locks the account book away.",
            "When goods are returned, {n2} looks at them twice before they go on the shelf again.",
            "A catalogue with {many} pictures hangs by the door, and children love it.",
        ],
    ),
    (
        &[
            "The railway between {home} and {away} was opened {years} years ago.",
            "Whoever travels by train from {home} should know a few things.",
        ],
        &[
            "The train leaves at {clock} and stops at every station, however small.",
            "Tickets are sold at the counter or, for a small charge, on the train.",
            "Trains with the highest priority are the night mail and the milk train.",
            "In case of danger there is a red handle, and pulling it without reason costs {many} crowns.",
            "A delay is announced in a loud voice, and nobody ever understands it.",
            "The conductor, {a nature} {man1} called {n1}, remembers every passenger.",
            "Luggage must be fastened, folded or held; bicycles travel in the last carriage.",
            "From the window one sees the hills, the river and, if one is lucky, {a animal}.",
            "In {season} the tracks have to be cleared by hand.",
        ],
    ),
    (
        &[
            "A garden teaches patience.",
            "In {season}, the gardens of {home} need the most attention.",
            "{n1} has {a look} garden behind the house, and {n2} has an opinion about it.",
        ],
        &[
            "First the soil is turned, then the seeds are put into straight rows.",
            "Too much water is as harmful as too little.",
            "Weeds grow without any help, which seems unfair.",
            "Tomatoes want sun; lettuce prefers shade.",
            "One row is kept for {beans} and another one for {leeks}.",
            "It is important to choose healthy plants and to check the leaves for insects.",
            "After the harvest the ground should rest under a cover of straw.",
            "A {colour} watering can stands ready, and a broken one is used as a pot.",
            "Neighbours exchange seeds over the fence and gossip at the same time.",
        ],
    ),
    (
        &[
            "Why does the wind blow?",
            "The weather in {home} changes quickly, and there are reasons for it.",
            "Sailors can read the sky like a page of a book.",
        ],
        &[
            "Warm air rises, cold air takes its place, and that movement is what we call wind.",
            "High thin clouds often mean that the weather will change within a day.",
            "Fog is nothing but a cloud that has come down to the ground.",
            "When {birds} fly low, some people expect rain, but the evidence is weak.",
            "Thunder follows lightning, because sound is slower than light.",
            "A storm from the sea brings salt as far as {away}.",
            "Snow protects young plants from the frost like a blanket.",
            "The temperature is measured in the shade, two metres above the ground.",
        ],
    ),
    (
        &[
            "Every house has its habits.",
            "{f1} explains how to keep an old house in good condition.",
            "The houses of {home} are built of {material} and {material}.",
        ],
        &[
            "A door that does not close properly needs oil, not force.",
            "Damage by water starts small and is discovered too late.",
            "Screws, nails, hooks and handles belong in separate drawers.",
            "The instructions for the stove hang on the wall, and {n2} is the only one who understands them.",
            "A cable should never lie under {a material} floor.",
            "If a lid is missing, a plate will do.",
            "Every spare part is kept in a bag with a name on it.",
            "Windows are cleaned with paper, and mirrors with patience.",
            "{n1} is responsible for the fire, {n2} for the locks, and the {animal} for the mice.",
        ],
    ),
    (
        &[
            "A library is a quiet place for loud thoughts.",
            "The library of {home} owns {many} hundred books.",
        ],
        &[
            "The books are arranged by subject and, within a subject, by the name of the author.",
            "Whoever borrows a book signs a list and promises to return it on time.",
            "A page with a folded corner makes the librarian unhappy.",
            "There is a catalogue of small cards, one for each title.",
            "Some stories are so popular that one has to wait for months.",
            "In the reading room there is a notice: \"Please think quietly.\"",
            "Old maps are kept in flat drawers and may be touched only with gloves.",
            "Once a year, missing books are searched for behind radiators and under beds.",
            "{n1} has read the same novel {years} times and still hopes for a different ending.",
        ],
    ),
    (
        &[
            "Music begins before the first note.",
            "{n1} teaches the {instrument} to [children|beginners|anyone who asks] in {home}.",
        ],
        &[
            "An instrument must be tuned, and so must the person who plays it.",
            "Practise slowly; speed comes by itself.",
            "A choir needs many voices that listen to one another.",
            "The {instrument} is said to be easy to learn and difficult to play well.",
            "Before a concert, musicians are nervous, hungry or both.",
            "A wrong note is soon forgotten, but a missing rhythm is not.",
            "The audience claps at the end, and in {away} also in the middle.",
            "Whoever cannot sing can still count the beats.",
        ],
    ),
    (
        &[
            "How does one stay healthy?",
            "The doctor of {home} gives the same advice to everyone.",
        ],
        &[
            "Sleep enough, walk every day and do not read bad news before breakfast.",
            "A cold takes a week with medicine and seven days without.",
            "Fresh air is free of charge and always in stock.",
            "Vegetables such as {beans} and {leeks} should be eaten often.",
            "For a small cut, clean water and a clean cloth are usually enough.",
            "In an urgent case, ring {phone} and describe what happened as exactly as you can.",
            "Laughing is safe for children and adults, in any amount.",
            "Those who sit all day should stand up every hour.",
        ],
    ),
    (
        &[
            "An office runs on paper, tea and good manners.",
            "{f1} manages a small office in {home}.",
            "What happens all day in the town hall of {home}?",
        ],
        &[
            "In the morning the letters are opened and put into three piles: urgent, normal and amusing.",
            "Each message is answered by the person who knows the matter best.",
            "A decision needs a reason, a date and a signature.",
            "Important papers are copied, in case the original is lost.",
            "The telephone is answered after the second ring: \"Town hall, {n2} speaking, how may I help?\"",
            "When two people want the same action for different reasons, nobody objects.",
            "A mistake is corrected in red ink, with the correct word above it.",
            "Complaints are read aloud on {day}, and the best one wins {a dish}.",
            "Lists are the memory of an office; {n1} keeps a list of lists.",
            "The report is finished when there is nothing left to leave out.",
        ],
    ),
    (
        &[
            "The sea near {home} is never the same colour twice.",
            "Fishing is hard work, says {f1} from {home}.",
        ],
        &[
            "Boats leave the harbour before sunrise and come back with the tide.",
            "The nets are mended by hand, knot after knot.",
            "A lighthouse sends out its own pattern of light, so that captains recognise it.",
            "Gulls follow the boats and complain about everything.",
            "The depth of the water is measured with a rope and a piece of lead.",
            "Storms are announced by {a colour} flag on the tower.",
            "On the beach one finds shells, wood and, once, {a thing}.",
            "Ropes are coiled to the right, always to the right.",
        ],
    ),
    (
        &[
            "School in {home} begins at {clock}.",
            "{n1} and {n2} go to the same school and disagree about it.",
        ],
        &[
            "The first lesson is arithmetic, because everyone is still awake.",
            "A question is worth more than an answer, the teacher says.",
            "Pupils learn to read, to write, to measure and to share.",
            "Those who finish early help the others or water the plants.",
            "In the break there is {dish}, and the noise is remarkable.",
            "The geography teacher has never left {home} but knows every capital.",
            "Homework should be short, interesting and legible.",
            "At the end of the year there is a play with {a animal} in it.",
            "A difficult word becomes easy when it is divided into syllables.",
        ],
    ),
    (
        &[
            "How should one write a letter?",
            "{n1} explains to {n2} how to write a polite message.",
        ],
        &[
            "Begin with a greeting, and say who you are.",
            "Explain the problem in two sentences; a third one is for the weather.",
            "Say what you wish: an answer, a visit, some money or simply attention.",
            "If it is urgent, say so once; if it can wait, say that too.",
            "Mention numbers and dates exactly, for somebody has to look them up.",
            "Do not be angry with the person who reads it, for that person is seldom guilty.",
            "Close with thanks, kind regards or best wishes, and put your name below.",
            "Read it again after supper, and cross out half of it.",
            "Somebody will be glad about every letter, except the one that should have been a visit.",
        ],
    ),
    (
        &[
            "Things are made of parts, and parts get lost.",
            "{f1} repairs everything that people bring to {home}.",
            "Before you throw {a thing} away, look at it closely.",
        ],
        &[
            "Most machines stop working because of dust.",
            "A screw that is too long is as useless as one that is too short.",
            "If something is bent, warm it; if it is cracked, glue it; if it is smashed, sweep it up.",
            "Scratches can be polished, and dents can be hammered out from inside.",
            "A strap or a handle is easy to replace, a spring is not.",
            "The replacement should be as strong as the original, and no stronger.",
            "Paint covers faults but does not remove them.",
            "For repairs {n1} charges [a few crowns|nothing|a jar of jam], and a cup of tea is expected.",
            "The hardest part is to find out what is wrong; the rest is {hobby}, says {n2}.",
        ],
    ),
    (
        &[
            "A journey begins with packing.",
            "{n1} is travelling from {home} to {away} and has made a plan.",
        ],
        &[
            "Take half the clothes and twice the money.",
            "A tent, a blanket and a torch are enough for a week in {season}.",
            "Guests should arrive on time and leave a little early.",
            "The map shows the road, but not the mud.",
            "Hotels in {away} are expensive, and the pillows are heavy.",
            "One should always choose the seat by the window.",
            "It is wise to tell somebody where you are going and when you expect to be back.",
            "Postcards take longer than the people who write them.",
            "The best souvenir is {a look} story, and it weighs nothing.",
        ],
    ),
    (
        &[
            "A wedding in {home} takes three days.",
            "{n1} and {n2} are getting married on {day}, and everyone has something to do.",
        ],
        &[
            "The husband bakes the bread, and the wife chooses the music, or the other way round.",
            "Presents are put on a long table: {a thing}, {a thing} and at least one useful object.",
            "The daughter of the {job} carries the rings on a {colour} cushion.",
            "Every guest writes a wish on paper and drops it into {a thing}.",
            "There are speeches, and some of them end.",
            "An aunt always cries, and an uncle always dances.",
            "The meal has seven courses; the favourite one is {dish}.",
            "When it is over, the neighbours help to carry the chairs home.",
        ],
    ),
];

/// A short essay: an opening and some of what there is to say about it.
pub(crate) fn essay(dice: &mut Dice) -> String {
    let (mut scene, _) = cast(dice, 2);
    scene.set("home", town(dice));
    scene.set("away", town(dice));
    scene.set("years", dice.between(2, 60).to_string());
    scene.set("many", dice.between(2, 99).to_string());
    scene.set("phone", digits(dice, 4));
    let both = dice.sample(words::list("vegetable"), 2);
    scene.set("beans", plural(both[0]));
    scene.set("leeks", plural(both[1]));
    scene.set("birds", plural(dice.pick(words::list("bird"))));
    let (openings, points) = dice.choose(TOPICS);
    let mut lines = vec![scene.one(dice, openings)];
    let count = dice.between(5, points.len());
    for point in dice.sample(points, count) {
        lines.push(scene.say(dice, point));
    }
    let half = lines.len().div_ceil(2);
    format!("{}\n\n{}", lines[..half].join(" "), lines[half..].join(" "))
}
