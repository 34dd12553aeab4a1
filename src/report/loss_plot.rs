//! `loss.svg`: how the loss of a run went; `comparison.svg`: how the evaluation loss of several methods did.

use super::chart::{COLOURS, Line, Marker, draw, is_drawn, missing};
use super::metrics::Metric;
use crate::Result;
use plotters::style::Color;

/// One method's evaluation losses.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// Name of the method.
    pub name: String,
    /// Step and loss.
    pub points: Vec<(u64, f64)>,
}

/// The picture of one run: training loss, its smoothed course, evaluation loss.
pub fn loss_svg(title: &str, metrics: &[Metric]) -> Result<String> {
    let mut training = Vec::new();
    let mut evaluation = Vec::new();
    for metric in metrics {
        match metric {
            Metric::Step(report) => training.push((report.step as f64, report.loss)),
            Metric::Eval(report) => evaluation.push((report.step as f64, report.eval_loss)),
        }
    }
    let smoothed = smooth(&training);
    let unseen = missing(&training);
    let training = thin_out(&training);
    let (blue, orange) = (COLOURS[0], COLOURS[1]);
    let mut lines = Vec::new();
    let style = if smoothed.is_empty() {
        blue.stroke_width(2)
    } else {
        blue.mix(0.3).stroke_width(1)
    };
    lines.push(Line {
        missing: unseen,
        ..Line::new("training", &training, style)
    });
    lines.push(Line::new("smoothed", &smoothed, blue.stroke_width(3)));
    lines.push(Line {
        marker: Some(Marker::Circle),
        ..Line::new("evaluation", &evaluation, orange.stroke_width(2))
    });
    lines.retain(|line| !line.points.is_empty() || line.missing > 0);
    draw(title, "loss (nats per token)", &lines)
}

/// The picture of a comparison: each method's evaluation loss by step, with its last value.
pub fn comparison_svg(title: &str, curves: &[Curve]) -> Result<String> {
    let points: Vec<Vec<_>> = curves
        .iter()
        .map(|curve| {
            curve
                .points
                .iter()
                .map(|&(step, loss)| (step as f64, loss))
                .collect()
        })
        .collect();
    let names: Vec<String> = curves
        .iter()
        .map(
            |curve| match curve.points.iter().rfind(|(_, loss)| is_drawn(*loss)) {
                Some((_, loss)) => format!("{} {loss:.3}", curve.name),
                None => curve.name.clone(),
            },
        )
        .collect();
    let mut lines = Vec::new();
    for (index, (points, name)) in points.iter().zip(&names).enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        lines.push(Line {
            marker: Some(Marker::ALL[index % Marker::ALL.len()]),
            ..Line::new(name, points, colour.stroke_width(2))
        });
    }
    draw(title, "evaluation loss (nats per token)", &lines)
}

/// The average over about a twentieth of the points, the nearest counting most; nothing for a line too short to need it.
///
/// It looks both ways, for an average of the past alone lags behind a falling loss.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    const FEWEST: usize = 20;
    if points.len() < FEWEST {
        return Vec::new();
    }
    let finite: Vec<_> = points
        .iter()
        .copied()
        .filter(|point| is_drawn(point.1))
        .collect();
    let keep = 1.0 - 1.0 / (points.len() as f64 / 40.0).max(3.0);
    // Sum of losses and of weights, up to each point from either side.
    let gather = |(sum, weight): &mut (f64, f64), &(_, loss): &(f64, f64)| {
        *sum = keep * *sum + loss;
        *weight = keep * *weight + 1.0;
        Some((*sum, *weight))
    };
    let before = finite.iter().scan((0.0, 0.0), gather);
    let mut after: Vec<_> = finite.iter().rev().scan((0.0, 0.0), gather).collect();
    after.reverse();
    let smoothed: Vec<_> = finite
        .iter()
        .zip(before.zip(after))
        // Both sums hold the point itself.
        .map(|(point, (before, after))| {
            let sum = before.0 + after.0 - point.1;
            (point.0, sum / (before.1 + after.1 - 1.0))
        })
        .collect();
    thin_out(&smoothed)
}

/// No more points than pixels can show: of each group the least and the greatest loss, so that no peak is lost.
fn thin_out(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    const MOST: usize = 1600;
    if points.len() <= MOST {
        return points.to_vec();
    }
    let mut thin = Vec::with_capacity(MOST + 2);
    for group in points.chunks(points.len().div_ceil(MOST / 2)) {
        let finite = || (0..group.len()).filter(|&index| is_drawn(group[index].1));
        let by_loss = |&a: &usize, &b: &usize| group[a].1.total_cmp(&group[b].1);
        let least = finite().min_by(by_loss);
        let greatest = finite().max_by(by_loss);
        let (Some(least), Some(greatest)) = (least, greatest) else {
            continue;
        };
        thin.push(group[least.min(greatest)]);
        if least != greatest {
            thin.push(group[least.max(greatest)]);
        }
    }
    thin
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::metrics::{EvalReport, StepReport};

    fn step(step: u64, loss: f64) -> Metric {
        Metric::Step(StepReport {
            step,
            loss,
            learning_rate: 1e-4,
            gradient_norm: 1.0,
            target_tokens: 1,
            tokens_per_second: 1.0,
            peak_memory_bytes: 1,
            epoch: 1.0,
        })
    }

    fn eval(step: u64, eval_loss: f64) -> Metric {
        Metric::Eval(EvalReport {
            step,
            eval_loss,
            eval_tokens: 1,
            accuracy: None,
            epoch: 1.0,
        })
    }

    /// A run as they look: falling, with noise from a small generator.
    fn run(steps: u64) -> Vec<Metric> {
        let mut noise = 1_u64;
        let mut metrics = Vec::new();
        for index in 1..=steps {
            noise = noise
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let jitter = (noise >> 40) as f64 / (1_u64 << 24) as f64 - 0.5;
            let done = index as f64 / steps as f64;
            let loss = 1.2 + 1.6 * (-5.0 * done).exp() + 0.5 * jitter;
            metrics.push(step(index, loss));
            if index % steps.div_ceil(8) == 0 {
                metrics.push(eval(index, 1.35 + 1.5 * (-5.0 * done).exp()));
            }
        }
        metrics
    }

    fn curves() -> Vec<Curve> {
        let names = [
            "lora",
            "dora",
            "ia3",
            "last-layers",
            "prompt",
            "bitfit",
            "vera",
            "full",
        ];
        names
            .iter()
            .enumerate()
            .map(|(index, name)| Curve {
                name: (*name).to_owned(),
                points: (0..=6)
                    .map(|eval| {
                        let speed = 0.9 - 0.1 * index as f64;
                        let rest = (-speed * eval as f64).exp();
                        (eval * 50, 1.2 + 0.1 * (index % 3) as f64 + 1.3 * rest)
                    })
                    .collect(),
            })
            .collect()
    }

    fn labels(svg: &str) -> Vec<&str> {
        svg.split("</text>")
            .filter_map(|part| part.rsplit_once(">\n").map(|(_, label)| label.trim()))
            .collect()
    }

    /// Shows the pictures: `RETUNE_PICTURES=target/pictures cargo test -p retune --lib loss_plot`.
    fn keep(name: &str, svg: &str) {
        if let Some(folder) = std::env::var_os("RETUNE_PICTURES") {
            std::fs::create_dir_all(&folder).expect("a folder");
            std::fs::write(std::path::Path::new(&folder).join(name), svg).expect("written");
        }
    }

    #[test]
    fn shows_a_run() {
        let svg = loss_svg("lora on Qwen2.5-0.5B", &run(400)).expect("a picture");
        keep("run.svg", &svg);
        let labels = labels(&svg);
        for label in [
            "lora on Qwen2.5-0.5B",
            "step",
            "training",
            "smoothed",
            "evaluation",
            "400",
        ] {
            assert!(labels.contains(&label), "{label} in {labels:?}");
        }
    }

    #[test]
    fn shows_odd_runs() {
        let odd = [
            ("empty.svg", vec![]),
            ("one.svg", vec![step(1, 2.5)]),
            ("one-eval.svg", vec![eval(0, 2.5)]),
            (
                "constant.svg",
                (1..=50).map(|index| step(index, 2.0)).collect(),
            ),
            ("zero.svg", (1..=50).map(|index| step(index, 0.0)).collect()),
            ("few.svg", run(10)),
            ("nan.svg", {
                let mut metrics = run(60);
                metrics[20] = step(20, f64::NAN);
                metrics[40] = step(40, f64::INFINITY);
                metrics
            }),
            ("all-nan.svg", vec![step(1, f64::NAN), step(2, f64::NAN)]),
            (
                "tiny-values.svg",
                (5000..=5100)
                    .map(|index| step(index, 1.0 / index as f64))
                    .collect(),
            ),
        ];
        for (name, metrics) in odd {
            let svg = loss_svg(name, &metrics).expect("a picture");
            keep(name, &svg);
            assert!(svg.ends_with("</svg>\n"), "{name}");
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{name}");
        }
    }

    #[test]
    fn says_how_many_losses_it_cannot_show() {
        let metrics = [step(1, 2.0), step(2, f64::NAN), step(3, 1.0)];
        let svg = loss_svg("broken", &metrics).expect("a picture");
        assert!(svg.contains("not finite: 1 of training"));
    }

    #[test]
    fn shows_a_comparison() {
        let svg = comparison_svg("eight methods", &curves()).expect("a picture");
        keep("comparison.svg", &svg);
        let labels = labels(&svg);
        for label in ["last-layers 1.236", "evaluation loss (nats per token)"] {
            assert!(
                labels.iter().any(|found| found.starts_with(label)),
                "{label} in {labels:?}"
            );
        }
        let few: Vec<_> = curves().into_iter().take(3).collect();
        keep(
            "comparison-3.svg",
            &comparison_svg("three methods", &few).expect("a picture"),
        );
        comparison_svg("none", &[]).expect("a picture");
    }

    #[test]
    fn a_long_run_stays_small_and_keeps_its_peaks() {
        let mut metrics = run(200_000);
        metrics[77_777] = step(77_777, 9.0);
        metrics[777] = step(777, f64::NAN);
        metrics[778] = step(778, f64::NAN);
        let svg = loss_svg("long", &metrics).expect("a picture");
        keep("long.svg", &svg);
        assert!(svg.contains("not finite: 2 of training"));
        assert!(svg.len() < 100_000, "{}", svg.len());
        let points: Vec<_> = (0..100_000).map(|index| (f64::from(index), 1.0)).collect();
        let mut peaked = points;
        peaked[12_345].1 = 7.0;
        let thin = thin_out(&peaked);
        assert!(thin.len() <= 1602);
        assert!(thin.contains(&(12_345.0, 7.0)));
    }

    #[test]
    fn the_smoothed_line_does_not_lag() {
        let points: Vec<_> = (0..100)
            .map(|step| (f64::from(step), 200.0 - f64::from(step)))
            .collect();
        let smoothed = smooth(&points);
        assert!((smoothed[50].1 - 150.0).abs() < 1e-6, "{:?}", smoothed[50]);
        let constant: Vec<_> = (0..30).map(|step| (f64::from(step), 2.0)).collect();
        assert!(
            smooth(&constant)
                .iter()
                .all(|point| (point.1 - 2.0).abs() < 1e-12)
        );
        assert!(smooth(&constant[..19]).is_empty());
    }
}
