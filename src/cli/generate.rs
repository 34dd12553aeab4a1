//! `retune generate`: text that follows a prompt.

use super::args::{AdapterArgs, ModelArgs};
use super::progress::{Progress, Show};
use super::{interrupt, note, output};
use crate::data::{Layout, Prompt, SpecialTokens, Tokenizer, read_prompts};
use crate::generate::{
    Control, Generation, GenerationConfig, GenerationOptions, Generator, StopReason,
};
use crate::model::Model;
use crate::{Context, Error, Result};
use clap::{ArgGroup, Args};
use serde_json::json;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

/// What `retune generate` can be told.
#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("source").args(["prompt", "prompt_file", "data"]),
    after_help = "\
The text goes to standard output as it comes, figures go to standard error. A terminal is shown control characters \
spelt out; a file or another program gets them as they are. Without `--prompt`, `--prompt-file` and `--data` the prompt \
is read from standard input.

Examples:
  retune generate --model ./base --prompt \"Once upon a time\" --max-tokens 100
  retune generate --model ./base --adapter my-adapter --chat --prompt \"What is a pangolin?\"
  retune generate --model ./base --data questions.jsonl --temperature 0 > answers.jsonl"
)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    base: ModelArgs,

    #[command(flatten)]
    adapter: AdapterArgs,

    /// Text to go on from
    #[arg(long, value_name = "TEXT", help_heading = "Prompt")]
    prompt: Option<String>,

    /// File with the text to go on from; one line end at its end is left out
    #[arg(long, value_name = "FILE", help_heading = "Prompt")]
    prompt_file: Option<PathBuf>,

    /// Records to answer, one after the other: those of training data, with or without answers. Prints JSON lines with
    /// `prompt`, `text`, `stop_reason`, `tokens` (ids), `prompt_tokens` (their number), and the data's `reference`
    #[arg(long, value_name = "FILE", help_heading = "Prompt")]
    data: Option<PathBuf>,

    /// Take the prompt for what a user says, laid out by the model's chat template
    #[arg(long, help_heading = "Prompt")]
    chat: bool,

    /// What the system says before the user
    #[arg(long, value_name = "TEXT", requires = "chat", help_heading = "Prompt")]
    system: Option<String>,

    #[command(flatten)]
    generation: GenerationArgs,

    /// Print the result as JSON when it is complete
    #[arg(long)]
    json: bool,

    /// Say nothing but the text and errors
    #[arg(long)]
    quiet: bool,
}

/// How to generate; what `generate` and `chat` have in common.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Generation")]
pub(super) struct GenerationArgs {
    /// Most tokens to generate
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub(super) max_tokens: usize,

    /// Divides the scores: below 1 likely tokens become likelier, 0 takes the likeliest always [default: the model's, else
    /// 0]
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    temperature: Option<f64>,

    /// Draw among this many of the likeliest tokens; 0 is all [default: the model's, else 50]
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,

    /// Draw among the likeliest tokens that together have this probability, 0 to 1 [default: the model's, else 1]
    #[arg(long, allow_negative_numbers = true, value_name = "SHARE")]
    top_p: Option<f64>,

    /// Draw among tokens at least this likely relative to the likeliest, 0 to 1 [default: the model's, else 0]
    #[arg(long, allow_negative_numbers = true, value_name = "SHARE")]
    min_p: Option<f64>,

    /// Makes tokens of the text so far less likely: 1 not at all, 1.1 a little [default: the model's, else 1]
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    repetition_penalty: Option<f64>,

    /// Start of the draws: the same seed gives the same text
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,

    /// End before this text; may be given several times [default: the model's]
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Show special tokens such as end marks
    #[arg(long)]
    show_special: bool,
}

impl GenerationArgs {
    /// The options that the model in `folder` suggests, and on top of them what was typed.
    pub(super) fn options(
        &self,
        folder: &Path,
        model: &Model,
        tokenizer: &Tokenizer,
        show: Show,
    ) -> Result<GenerationOptions> {
        let config = GenerationConfig::read(folder, &model.config)?;
        for text in &config.notes {
            note(show, &format!("note: {text}"));
        }
        let mut options = config.options(tokenizer);
        options.max_tokens = self.max_tokens;
        options.special = match self.show_special {
            true => SpecialTokens::Keep,
            false => SpecialTokens::Skip,
        };
        if self.stop.iter().any(String::is_empty) {
            return Err(Error::usage("`--stop` needs a text that is not empty"));
        }
        if !self.stop.is_empty() {
            options.stop.clone_from(&self.stop);
        }
        let sampling = &mut options.sampling;
        sampling.seed = self.seed;
        sampling.temperature = self.temperature.unwrap_or(sampling.temperature);
        sampling.top_k = self.top_k.unwrap_or(sampling.top_k);
        sampling.top_p = self.top_p.unwrap_or(sampling.top_p);
        sampling.min_p = self.min_p.unwrap_or(sampling.min_p);
        sampling.repetition_penalty = self
            .repetition_penalty
            .unwrap_or(sampling.repetition_penalty);
        if sampling.temperature == 0.0 {
            self.check_greedy()?;
        }
        options.sampling = options.sampling.validated()?;
        Ok(options)
    }

    /// Refuses options that choose among tokens, when the likeliest is always taken.
    fn check_greedy(&self) -> Result<()> {
        let without_effect = [
            ("--top-k", self.top_k.is_some()),
            ("--top-p", self.top_p.is_some()),
            ("--min-p", self.min_p.is_some()),
        ];
        match without_effect.iter().find(|(_, typed)| *typed) {
            None => Ok(()),
            Some((name, _)) => Err(Error::usage(format!(
                "`{name}` has no effect at temperature 0, where the likeliest token is always taken"
            ))
            .hint("add `--temperature 1`, or a lower one")),
        }
    }
}

/// Runs `retune generate`.
pub(super) fn generate(arguments: &GenerateArgs) -> Result<()> {
    let show = Show::on_stderr(arguments.quiet);
    let folder = arguments.base.folder(show)?;
    let tokenizer = arguments.base.tokenizer(&folder)?;
    let layout = match (arguments.chat, &arguments.system) {
        (false, _) => Layout::Plain,
        (true, system) => Layout::Chat {
            system: system.as_deref(),
        },
    };
    // Read before the model is: a mistake in them is seen at once.
    let prompts = prompts(arguments, layout, &tokenizer, show)?;
    let placement = arguments.base.placement(&folder, show)?;
    let model = arguments
        .adapter
        .load_onto(&folder, &tokenizer, &placement)?;
    let options = arguments
        .generation
        .options(&folder, &model, &tokenizer, show)?;
    let mut generator = Generator::new(&model, &tokenizer)?;
    interrupt::watch_quietly()?;
    if arguments.data.is_some() {
        return answer_all(&mut generator, &prompts, &options, show);
    }
    let mut printer = Printer::new(!arguments.json);
    for prompt in &prompts {
        let generation =
            generator.generate(&prompt.tokens, &options, &mut |text| printer.hear(text))?;
        if arguments.json {
            let mut line = record(prompt, &generation);
            line["prompt_seconds"] = generation.prompt_seconds.into();
            line["seconds"] = generation.seconds.into();
            printer.line(&line.to_string())?;
        }
        printer.finish_line()?;
        note(show, &summary(&generation));
        if interrupt::asked() {
            return Err(Error::interrupted("interrupted"));
        }
    }
    Ok(())
}

/// The prompts that were asked for: one, or those of a file.
fn prompts(
    arguments: &GenerateArgs,
    layout: Layout,
    tokenizer: &Tokenizer,
    show: Show,
) -> Result<Vec<Prompt>> {
    if let Some(file) = &arguments.data {
        let mut prompts = Vec::new();
        read_prompts(file, layout, tokenizer, |_, prompt| {
            prompts.push(prompt);
            Ok(())
        })?;
        if prompts.is_empty() {
            return Err(Error::new("the file holds no record").at(file.display()));
        }
        return Ok(prompts);
    }
    let text = match (&arguments.prompt, &arguments.prompt_file) {
        (Some(text), _) => text.clone(),
        (None, Some(file)) => {
            let text = std::fs::read_to_string(file).at(file.display())?;
            without_line_end(&text).to_owned()
        }
        (None, None) => {
            let mut stdin = std::io::stdin().lock();
            if stdin.is_terminal() {
                note(
                    show,
                    "reading the prompt from the terminal; end it with Ctrl-D",
                );
            }
            let mut text = String::new();
            stdin.read_to_string(&mut text).at("standard input")?;
            without_line_end(&text).to_owned()
        }
    };
    let prompt = Prompt::text(&text, layout, tokenizer)?;
    if prompt.tokens.is_empty() {
        return Err(
            Error::new("the prompt is empty, so there is nothing to go on from")
                .hint("give a text with `--prompt`, `--prompt-file` or on standard input"),
        );
    }
    Ok(vec![prompt])
}

fn without_line_end(text: &str) -> &str {
    let text = text.strip_suffix('\n').unwrap_or(text);
    text.strip_suffix('\r').unwrap_or(text)
}

/// One JSON line for each prompt.
fn answer_all(
    generator: &mut Generator,
    prompts: &[Prompt],
    options: &GenerationOptions,
    show: Show,
) -> Result<()> {
    let mut printer = Printer::new(false);
    let bar = Progress::items(show, "generating", prompts.len() as u64);
    let (mut right, mut compared, mut tokens) = (0, 0, 0);
    let started = std::time::Instant::now();
    for (index, prompt) in (0..).zip(prompts) {
        let mut options = options.clone();
        // Each text has draws of its own, whichever others are in the file.
        options.sampling.seed = options.sampling.seed.wrapping_add(index);
        let generation = generator
            .generate(&prompt.tokens, &options, &mut |text| printer.hear(text))
            .context(format!("cannot answer record {}", index + 1))?;
        if generation.stop_reason == StopReason::Interrupted {
            break;
        }
        tokens += generation.tokens.len();
        if let Some(reference) = &prompt.reference {
            compared += 1;
            right += usize::from(generation.text.trim() == reference.trim());
        }
        printer.line(&record(prompt, &generation).to_string())?;
        bar.advance(1);
    }
    bar.finish();
    if interrupt::asked() {
        return Err(Error::interrupted("interrupted"));
    }
    let mut line = format!(
        "{} texts, {tokens} tokens in {:.1} s",
        prompts.len(),
        started.elapsed().as_secs_f64()
    );
    if compared > 0 {
        line += &format!("; {right} of {compared} equal the data's answer");
    }
    note(show, &line);
    Ok(())
}

/// A result as JSON, the same for the same request.
fn record(prompt: &Prompt, generation: &Generation) -> serde_json::Value {
    let mut record = json!({
        "prompt": prompt.text,
        "text": generation.text,
        "stop_reason": generation.stop_reason,
        "tokens": generation.tokens,
        "prompt_tokens": generation.prompt_tokens,
    });
    if let Some(reference) = &prompt.reference {
        record["reference"] = reference.as_str().into();
    }
    record
}

/// What became of a text, in one line.
pub(super) fn summary(generation: &Generation) -> String {
    let new = generation.prompt_tokens - generation.reused_tokens;
    let mut line = format!("prompt: {} tokens", generation.prompt_tokens);
    if generation.reused_tokens > 0 {
        line += &format!(", {new} of them new,");
    }
    line += &format!(
        " in {:.2} s; text: {} tokens",
        generation.prompt_seconds,
        generation.tokens.len()
    );
    if let Some(speed) = generation.tokens_per_second() {
        line += &format!(" in {:.2} s, {speed:.0} tokens/s", generation.seconds);
    }
    line + match generation.stop_reason {
        StopReason::EndToken => "; ended by the model",
        StopReason::StopString => "; ended by a stop text",
        StopReason::MaxTokens => "; cut off by `--max-tokens`",
        StopReason::ContextFull => "; cut off at the end of the model's context",
        StopReason::Interrupted => "; interrupted",
    }
}

/// Standard output for text that arrives in pieces.
pub(super) struct Printer {
    streams: bool,
    /// Whether a terminal shows it, which a model must not command.
    on_terminal: bool,
    unfinished_line: bool,
}

impl Printer {
    /// Prints text as it is heard, if it `streams`.
    pub(super) fn new(streams: bool) -> Self {
        Self {
            streams,
            on_terminal: std::io::stdout().is_terminal(),
            unfinished_line: false,
        }
    }

    /// Prints a piece of text; Ctrl-C and a reader who has left end the text.
    pub(super) fn hear(&mut self, text: &str) -> Result<Control> {
        if self.streams && !text.is_empty() && self.print(text)? == Control::Stop {
            return Ok(Control::Stop);
        }
        Ok(match interrupt::asked() {
            true => Control::Stop,
            false => Control::Continue,
        })
    }

    /// Prints a line.
    pub(super) fn line(&mut self, line: &str) -> Result<()> {
        self.print(line)?;
        self.print("\n").map(drop)
    }

    /// Ends the line if text has left it unfinished.
    pub(super) fn finish_line(&mut self) -> Result<()> {
        match self.unfinished_line {
            true => self.print("\n").map(drop),
            false => Ok(()),
        }
    }

    fn print(&mut self, text: &str) -> Result<Control> {
        let control = output::write(&output::for_reader(text, self.on_terminal))?;
        self.unfinished_line = control == Control::Continue && !text.ends_with('\n');
        Ok(control)
    }
}
