//! `retune merge`: folds adapters into a checkpoint of its own.

use super::args::warn_of_base;
use super::interrupt;
use super::output::print_line;
use super::progress::{Progress, Show};
use crate::adapter_folder::{Adapter, OtherBase};
use crate::atomic::Existing;
use crate::merge::{LayerCheck, MergeOptions, MergeProgress, MergeReport, merge as merge_adapters};
use crate::model::ModelConfig;
use crate::report::format;
use crate::{Error, Result};
use candle_core::DType;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use std::str::FromStr;

const EXAMPLES: &str = "\
Examples:
  retune merge --model ./base --adapter my-adapter --out merged
  retune merge --model ./base --adapter law --adapter french=0.5 --out merged --dtype bf16

Several adapters add up: each weight W of the model becomes W + sum of weight x (W adapted by it - W).

The folder is in the format of Hugging Face transformers and needs neither adapter nor retune. Before it appears, each \
merged layer and the logits of the whole model are compared with base and adapters; if rounding does not explain a \
difference, nothing is written.";

/// What `retune merge` can be told.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct MergeArgs {
    /// Base model: a Hugging Face folder, or a hub id such as `org/name` or `org/name@revision`
    #[arg(long, value_name = "DIR|ID")]
    model: String,

    /// Adapter folder, written by retune or PEFT, and how much of it to take: 1 is all, 0.5 half; may be given repeatedly
    #[arg(long, required = true, value_name = "DIR[=WEIGHT]")]
    adapter: Vec<WeightedFolder>,

    /// Folder for the merged model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Type to write all weights in [default: each in its own, as in the base]
    #[arg(long, value_enum, value_name = "TYPE")]
    dtype: Option<StoredType>,

    /// Most bytes in one file of weights, such as `5GB` or `500MB` [default: the files of the base]
    #[arg(long, value_name = "SIZE")]
    max_shard_size: Option<FileSize>,

    /// Go on although an adapter was trained on another base
    #[arg(long)]
    allow_other_base: bool,

    /// Replace an earlier merge in the folder, which may hold nothing else
    #[arg(long)]
    overwrite: bool,

    /// Say nothing but errors and the result
    #[arg(long)]
    quiet: bool,

    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// A type that weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StoredType {
    F32,
    F16,
    Bf16,
}

impl StoredType {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// `DIR` or `DIR=WEIGHT`.
#[derive(Debug, Clone, PartialEq)]
struct WeightedFolder {
    folder: PathBuf,
    weight: f64,
}

impl FromStr for WeightedFolder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let whole = || Self {
            folder: text.into(),
            weight: 1.0,
        };
        // A folder's own name may hold `=`.
        let (folder, weight) = match text.rsplit_once('=') {
            Some(parts) if !Path::new(text).exists() => parts,
            _ => return Ok(whole()),
        };
        match weight.parse::<f64>() {
            Ok(0.0) => Err(
                "a weight of 0 takes nothing of the adapter: leave it out, or give it another"
                    .to_owned(),
            ),
            Ok(weight) if weight.is_finite() && !folder.is_empty() => Ok(Self {
                folder: folder.into(),
                weight,
            }),
            _ => Err(format!(
                "`{weight}` is not a weight: write a folder, or `folder=0.5`"
            )),
        }
    }
}

/// A number of bytes, written `5GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileSize(u64);

impl FromStr for FileSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write a size such as `5GB`, `500MB` or `2GiB`".to_owned();
        let digits = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
        let unit: f64 = match text[digits.len()..].to_ascii_uppercase().as_str() {
            "" | "B" => 1.0,
            "KB" => 1e3,
            "MB" => 1e6,
            "GB" => 1e9,
            "KIB" => 1024.0,
            "MIB" => 1024.0 * 1024.0,
            "GIB" => 1024.0 * 1024.0 * 1024.0,
            _ => return Err(wrong()),
        };
        match digits.trim().parse::<f64>() {
            Ok(number) if number * unit >= 1.0 && number.is_finite() => {
                Ok(Self((number * unit) as u64))
            }
            _ => Err(wrong()),
        }
    }
}

/// Runs `retune merge`.
pub(super) fn merge(arguments: &MergeArgs) -> Result<()> {
    interrupt::watch_quietly()?;
    let show = Show::on_stderr(arguments.quiet || arguments.json);
    let base = super::hub::resolve(&arguments.model, show)?;
    // What is wrong with its configuration is said when it is merged.
    if let Ok(config) = ModelConfig::read(&base) {
        warn_of_base(&base, &config, show);
    }
    let mut adapters = Vec::new();
    for WeightedFolder { folder, weight } in &arguments.adapter {
        adapters.push((Adapter::open(folder)?, *weight));
    }
    let options = MergeOptions {
        dtype: arguments.dtype.map(StoredType::dtype),
        other_base: match arguments.allow_other_base {
            true => OtherBase::Allow,
            false => OtherBase::Refuse,
        },
        max_shard_bytes: arguments.max_shard_size.map(|size| size.0),
        existing: match arguments.overwrite {
            true => Existing::Replace,
            false => Existing::Refuse,
        },
    };
    let mut display = Display { show, bar: None };
    let report = merge_adapters(
        &base,
        &adapters,
        &arguments.out,
        &options,
        &mut |progress| {
            if interrupt::asked() {
                return Err(Error::interrupted("stopped; nothing was written"));
            }
            display.update(progress);
            Ok(())
        },
    )?;
    drop(display);
    if arguments.json {
        print_line!("{}", serde_json::json!(report))?;
    } else {
        print(&report)?;
    }
    Ok(())
}

fn print(report: &MergeReport) -> Result<()> {
    let files = match report.files {
        1 => "1 file".to_owned(),
        count => format!("{count} files"),
    };
    print_line!(
        "merged model: {} ({} in {files})",
        report.folder.display(),
        format::bytes(report.bytes)
    )?;
    print_line!("{} of {} tensors adapted", report.merged, report.tensors)?;
    if report.untied_head {
        print_line!(
            "the output head is a matrix of its own now: the adapter changes the embedding alone"
        )?;
    }
    print_line!("{}", layers_line(report.layers))?;
    let probe = report.probe;
    print_line!(
        "probe: logits within {:.1e} of base and adapter ({:.1e} allowed); the adapter itself moves them by up to {:.2}",
        probe.difference,
        probe.bound,
        probe.effect
    )?;
    if probe.rounding_is_large() {
        print_line!(
            "note: rounding the weights undoes a good part of what the adapter does; `--dtype f32` keeps all of it"
        )?;
    }
    print_line!(
        "next: retune generate --model {} --prompt \"...\"",
        report.folder.display()
    )
}

/// The check that holds in half precision too, where logits drift too far to prove much.
fn layers_line(layers: LayerCheck) -> String {
    format!(
        "layers: {} tried one by one, outputs within {:.1e} of base and adapter relative to the largest, at most {:.0} % of what rounding allows",
        layers.tried,
        layers.difference,
        100.0 * layers.of_bound
    )
}

/// A bar for each stage of the work.
struct Display {
    show: Show,
    bar: Option<Progress>,
}

impl Display {
    fn update(&mut self, progress: MergeProgress) {
        match progress {
            MergeProgress::Probing => {
                self.bar = Some(Progress::spinner(self.show, "probing base and adapter"));
            }
            MergeProgress::Writing { done, total, .. } => {
                if done == 0 {
                    self.finish();
                    self.bar = Some(Progress::bytes(self.show, "merging", total));
                }
                if let Some(bar) = &self.bar {
                    bar.set(done);
                }
            }
            MergeProgress::Checking { total } => {
                if let Some(bar) = &self.bar {
                    bar.set(total);
                }
                self.finish();
                self.bar = Some(Progress::spinner(self.show, "probing the merged model"));
            }
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_may_have_a_weight() {
        let read = |text: &str| text.parse::<WeightedFolder>();
        let of = |folder: &str, weight| {
            Ok(WeightedFolder {
                folder: folder.into(),
                weight,
            })
        };
        assert_eq!(read("runs/law"), of("runs/law", 1.0));
        assert_eq!(read("runs/law=0.5"), of("runs/law", 0.5));
        assert_eq!(read("rank=8=-1"), of("rank=8", -1.0));
        for wrong in ["law=half", "law=", "=1", "law=inf", "law=0", "law=-0"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        let home = tempfile::tempdir().expect("a folder");
        let named = home.path().join("rank=8");
        std::fs::create_dir(&named).expect("a folder");
        let named = named.to_str().expect("UTF-8");
        assert_eq!(read(named), of(named, 1.0));
    }

    #[test]
    fn the_layers_are_reported_beside_the_logits() {
        let line = layers_line(LayerCheck {
            tried: 14,
            difference: 1.93e-3,
            of_bound: 0.42,
        });
        assert_eq!(
            line,
            "layers: 14 tried one by one, outputs within 1.9e-3 of base and adapter relative to the largest, at most 42 % of what rounding allows"
        );
    }

    #[test]
    fn sizes_have_units() {
        let read = |text: &str| text.parse::<FileSize>().map(|size| size.0);
        assert_eq!(read("5GB"), Ok(5_000_000_000));
        assert_eq!(read("1.5 MiB"), Ok(1_572_864));
        assert_eq!(read("12"), Ok(12));
        for wrong in ["", "GB", "-1GB", "5 bananas", "0", "infGB"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
