//! `retune chat`: a conversation with the model.

use super::args::{AdapterArgs, ModelArgs};
use super::generate::{GenerationArgs, Printer, summary};
use super::interrupt;
use super::output::say;
use super::progress::Show;
use crate::data::{Message, Prompt};
use crate::generate::{GenerationOptions, Generator, StopReason};
use crate::{Context, Error, Result};
use clap::Args;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::{BufRead, ErrorKind, IsTerminal, Stdin};

/// What `retune chat` can be told.
#[derive(Debug, Args)]
#[command(after_help = "\
In the conversation:
  /reset        forgets what was said
  /system TEXT  changes what the system says, and forgets what was said
  /system       shows what the system says
  /help         lists these
  /quit, /exit  ends it, as Ctrl-D does; Ctrl-C stops an answer
When standard input is no terminal, each of its lines is a turn. A space before
the `/` makes it a text for the model.

Example:
  retune chat --model ./base --adapter my-adapter --system \"You answer in one sentence.\" --temperature 0.7")]
pub(super) struct ChatArgs {
    #[command(flatten)]
    base: ModelArgs,

    #[command(flatten)]
    adapter: AdapterArgs,

    /// What the system says before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    #[command(flatten)]
    generation: GenerationArgs,

    /// Say how many tokens each answer had, and how fast they came
    #[arg(long)]
    stats: bool,
}

/// Runs `retune chat`.
pub(super) fn chat(arguments: &ChatArgs) -> Result<()> {
    let show = Show::on_stderr(false);
    let folder = arguments.base.folder(show)?;
    let tokenizer = arguments.base.tokenizer(&folder)?;
    tokenizer.chat_template().at(folder.display())?;
    let placement = arguments.base.placement(&folder, show)?;
    let model = arguments
        .adapter
        .load_onto(&folder, &tokenizer, &placement)?;
    let options = arguments
        .generation
        .options(&folder, &model, &tokenizer, show)?;
    let mut conversation = Conversation {
        generator: Generator::new(&model, &tokenizer)?,
        options,
        system: arguments.system.clone(),
        messages: Vec::new(),
        turns: 0,
        stats: arguments.stats,
    };
    let mut input = Input::open()?;
    interrupt::watch_quietly()?;
    if let Input::Terminal(_) = input {
        say!("{HELP}");
    }
    while let Some(line) = input.line()? {
        interrupt::forget();
        let done = match Command::of(&line) {
            Some(command) => conversation.obey(command),
            None => conversation.answer(&line).map(|()| Flow::Goes),
        };
        match (done, &input) {
            (Ok(Flow::Goes), _) => {}
            (Ok(Flow::Ends), _) => break,
            (Err(error), Input::Lines(_)) => return Err(error),
            // A person at a terminal can try something else.
            (Err(error), Input::Terminal(_)) => super::report(&error),
        }
    }
    Ok(())
}

const HELP: &str = "/reset forgets the conversation, /system TEXT changes what the system says, /help, /quit; Ctrl-C stops an answer";

const NOT_UTF8: &str = "a line that is not UTF-8 was left out";

/// Whether the conversation goes on.
#[derive(Debug, PartialEq, Eq)]
enum Flow {
    Goes,
    Ends,
}

/// A line that begins with `/`.
#[derive(Debug, PartialEq, Eq)]
enum Command<'a> {
    Reset,
    System(&'a str),
    Quit,
    Help,
    Unknown(&'a str),
}

impl<'a> Command<'a> {
    fn of(line: &'a str) -> Option<Self> {
        let typed = line.strip_prefix('/')?;
        let (name, rest) = typed.split_once(char::is_whitespace).unwrap_or((typed, ""));
        Some(match name {
            "reset" => Self::Reset,
            "system" => Self::System(rest.trim()),
            "quit" | "exit" => Self::Quit,
            "help" => Self::Help,
            _ => Self::Unknown(name),
        })
    }
}

/// What was said so far, and who answers.
struct Conversation<'a> {
    generator: Generator<'a>,
    options: GenerationOptions,
    system: Option<String>,
    /// Turns of user and assistant.
    messages: Vec<Message>,
    turns: u64,
    stats: bool,
}

impl Conversation<'_> {
    fn obey(&mut self, command: Command) -> Result<Flow> {
        match command {
            Command::Reset => {
                self.messages.clear();
                say!("the conversation is forgotten");
            }
            Command::System("") => match &self.system {
                Some(system) => say!("the system says: {system}"),
                None => say!("the system says nothing"),
            },
            Command::System(text) => {
                self.system = Some(text.to_owned());
                self.messages.clear();
                say!("the system says it from now on; the conversation is forgotten");
            }
            Command::Help => say!("{HELP}"),
            Command::Quit => return Ok(Flow::Ends),
            Command::Unknown(name) => say!(
                "no command is called `/{name}`: `/help` lists them; a space before the `/` makes it a text for the model"
            ),
        }
        Ok(Flow::Goes)
    }

    /// Takes the user's turn and prints the answer. A turn that cannot be answered is not part of the conversation.
    fn answer(&mut self, text: &str) -> Result<()> {
        let said = Message::new("user", text);
        let system = self
            .system
            .iter()
            .map(|system| Message::new("system", system));
        let messages: Vec<Message> = system
            .chain(self.messages.iter().cloned())
            .chain([said.clone()])
            .collect();
        let prompt = Prompt::conversation(&messages, None, self.generator.tokenizer())?;
        if prompt.tokens.len() >= self.generator.context() {
            return Err(Error::new(format!(
                "the conversation has {} tokens, and the model's context holds {}",
                prompt.tokens.len(),
                self.generator.context()
            ))
            .hint("`/reset` starts a new one"));
        }
        let mut options = self.options.clone();
        options.sampling.seed = options.sampling.seed.wrapping_add(self.turns);
        let mut printer = Printer::new(true);
        let generation = self
            .generator
            .generate(&prompt.tokens, &options, &mut |text| printer.hear(text));
        printer.finish_line()?;
        let generation = generation?;
        match generation.stop_reason {
            StopReason::EndToken | StopReason::StopString => {}
            StopReason::MaxTokens => say!(
                "(cut off after {} tokens; `--max-tokens` allows more)",
                generation.tokens.len()
            ),
            StopReason::ContextFull => {
                say!("(cut off: the model's context is full; /reset starts a new conversation)");
            }
            StopReason::Interrupted => say!("(interrupted)"),
        }
        if self.stats {
            say!("({})", summary(&generation));
        }
        self.turns += 1;
        self.messages.push(said);
        self.messages
            .push(Message::new("assistant", &generation.text));
        Ok(())
    }
}

/// Where the user's turns come from.
enum Input {
    /// A person, with line editing and history.
    Terminal(Box<DefaultEditor>),
    /// A file or another program.
    Lines(Stdin),
}

impl Input {
    fn open() -> Result<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self::Lines(stdin));
        }
        let editor = DefaultEditor::new().map_err(|error| unreadable(&error))?;
        Ok(Self::Terminal(Box::new(editor)))
    }

    /// The next line that is not blank; none at the end.
    fn line(&mut self) -> Result<Option<String>> {
        loop {
            let line = match self {
                Self::Lines(stdin) => {
                    let mut bytes = Vec::new();
                    let read = stdin.lock().read_until(b'\n', &mut bytes);
                    if read.at("standard input")? == 0 {
                        return Ok(None);
                    }
                    let Ok(line) = String::from_utf8(bytes) else {
                        say!("{NOT_UTF8}");
                        continue;
                    };
                    line.trim_end_matches(['\n', '\r']).to_owned()
                }
                Self::Terminal(editor) => match editor.readline("> ") {
                    Ok(line) => {
                        // Only a full history refuses a line.
                        let _ = editor.add_history_entry(&line);
                        line
                    }
                    Err(ReadlineError::Interrupted) => {
                        say!("(Ctrl-D or /quit ends the conversation)");
                        continue;
                    }
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(ReadlineError::Io(error)) if error.kind() == ErrorKind::InvalidData => {
                        say!("{NOT_UTF8}");
                        continue;
                    }
                    Err(error) => return Err(unreadable(&error)),
                },
            };
            if !line.trim().is_empty() {
                return Ok(Some(line));
            }
        }
    }
}

fn unreadable(error: &ReadlineError) -> Error {
    Error::new(format!("cannot read from the terminal: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_begin_with_a_slash() {
        assert_eq!(Command::of("hello"), None);
        assert_eq!(Command::of(" /reset"), None);
        assert_eq!(Command::of("/reset"), Some(Command::Reset));
        assert_eq!(
            Command::of("/system be  kind "),
            Some(Command::System("be  kind"))
        );
        assert_eq!(Command::of("/system"), Some(Command::System("")));
        assert_eq!(Command::of("/exit"), Some(Command::Quit));
        assert_eq!(Command::of("/rest"), Some(Command::Unknown("rest")));
        assert_eq!(Command::of("/"), Some(Command::Unknown("")));
    }
}
