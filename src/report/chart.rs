//! A line chart as SVG: named lines over steps, legible without a legend to search in.

use crate::{Error, Result};
use plotters::chart::{ChartBuilder, ChartContext};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::{
    Cartesian2d, Circle, Cross, DrawingArea, IntoDrawingArea, PathElement, RGBColor, Rectangle,
    SVGBackend, TriangleMarker,
};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, IntoFont, ShapeStyle, TextStyle, WHITE};
use std::fmt::Write as _;
use std::ops::Range;

const SIZE: (u32, u32) = (960, 540);
/// Least distance between two names, in pixels.
const NAME_HEIGHT: i32 = 20;

const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);
const FAINT_INK: RGBColor = RGBColor(0x6b, 0x6b, 0x6b);
const GRID: RGBColor = RGBColor(0xe6, 0xe6, 0xe6);

/// The palette of Okabe and Ito, which colour-blind people can tell apart, without its yellow, which is faint on white.
pub(super) const COLOURS: [RGBColor; 7] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x33, 0x33, 0x33),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// A line to be drawn, and its name at its right end.
pub(super) struct Line<'a> {
    pub(super) name: &'a str,
    pub(super) points: &'a [(f64, f64)],
    pub(super) style: ShapeStyle,
    pub(super) marker: Option<Marker>,
    /// Points whose loss is not finite, also those that `points` leaves out.
    pub(super) missing: usize,
}

impl<'a> Line<'a> {
    pub(super) fn new(name: &'a str, points: &'a [(f64, f64)], style: ShapeStyle) -> Self {
        Self {
            name,
            points,
            style,
            marker: None,
            missing: missing(points),
        }
    }
}

/// The shape at each point: a second way to tell lines apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Marker {
    Circle,
    Triangle,
    Square,
    Cross,
}

impl Marker {
    pub(super) const ALL: [Self; 4] = [Self::Circle, Self::Triangle, Self::Square, Self::Cross];

    fn draw(self, area: &Area, (x, y): (i32, i32), style: ShapeStyle) -> Result<()> {
        let filled = style.filled();
        match self {
            Self::Circle => area.draw(&Circle::new((x, y), 4, filled)),
            Self::Triangle => area.draw(&TriangleMarker::new((x, y), 6, filled)),
            Self::Square => area.draw(&Rectangle::new([(x - 4, y - 4), (x + 4, y + 4)], filled)),
            Self::Cross => area.draw(&Cross::new((x, y), 4, style)),
        }
        .map_err(failed)
    }
}

/// The whole picture. `loss_name` stands at the upright axis.
pub(super) fn draw(title: &str, loss_name: &str, lines: &[Line]) -> Result<String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(failed)?;
    area.draw_text(title, &text(22, INK), (24, 16))
        .map_err(failed)?;

    let points = || lines.iter().flat_map(|line| line.points);
    let steps = range_of_steps(points().map(|point| point.0));
    let losses = range_of_losses(points().map(|point| point.1));
    let decimals = decimals_for(&losses);
    let digits = format!("{:.decimals$}", losses.end).len();
    let names_width = names_width(lines);
    let mut chart = ChartBuilder::on(&area)
        .margin_top(60)
        .margin_left(12)
        .margin_bottom(12)
        .margin_right(names_width)
        .x_label_area_size(44)
        .y_label_area_size(36 + 10 * digits as u32)
        .build_cartesian_2d(steps, losses)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE.mix(0.0))
        .bold_line_style(GRID)
        .axis_style(FAINT_INK)
        .x_desc("step")
        .y_desc(loss_name)
        .x_labels(8)
        .y_labels(8)
        .x_label_formatter(&|step| step_label(*step))
        .y_label_formatter(&|loss| format!("{loss:.decimals$}"))
        .label_style(text(15, FAINT_INK))
        .axis_desc_style(text(16, INK))
        .draw()
        .map_err(failed)?;
    for line in lines {
        draw_line(&area, &chart, line)?;
    }
    draw_names(&area, &chart, lines)?;
    draw_note(&area, lines)?;
    area.present().map_err(failed)?;
    drop(chart);
    drop(area);
    Ok(svg)
}

/// A line broken where a loss is not finite, with its markers.
fn draw_line(area: &Area, chart: &Chart, line: &Line) -> Result<()> {
    for piece in line.points.split(|point| !is_drawn(point.1)) {
        let place = |&point| chart.backend_coord(&point);
        match piece {
            [] => {}
            // A single point has no line, so it always gets a marker.
            [point] if line.marker.is_none() => {
                let size = line.style.stroke_width as i32 + 2;
                area.draw(&Circle::new(place(point), size, line.style.filled()))
                    .map_err(failed)?;
            }
            _ => {
                let places: Vec<_> = piece.iter().map(place).collect();
                area.draw(&PathElement::new(places, line.style))
                    .map_err(failed)?;
            }
        }
        if let Some(marker) = line.marker {
            for point in piece {
                marker.draw(area, place(point), line.style)?;
            }
        }
    }
    Ok(())
}

/// Room at the right for the names of the lines, in pixels.
fn names_width(lines: &[Line]) -> u32 {
    let longest = lines.iter().map(|line| line.name.chars().count()).max();
    (50 + 9 * longest.unwrap_or(0) as u32).min(SIZE.0 / 2)
}

/// Each line's name beside its last point, moved apart where they would overlap.
fn draw_names(area: &Area, chart: &Chart, lines: &[Line]) -> Result<()> {
    let mut names = Vec::new();
    for line in lines {
        let last = line.points.iter().rfind(|point| is_drawn(point.1));
        let height = last.map_or(i32::MAX / 2, |&point| chart.backend_coord(&point).1);
        names.push((height, line));
    }
    names.sort_by_key(|(height, _)| *height);
    let (top, bottom) = (
        chart.plotting_area().get_pixel_range().1.start,
        SIZE.1 as i32 - 70,
    );
    let heights: Vec<_> = names.iter().map(|(height, _)| *height).collect();
    let x = (SIZE.0 - names_width(lines)) as i32 + 10;
    for (y, (_, line)) in spread(&heights, top..bottom).into_iter().zip(names) {
        let swatch = PathElement::new(vec![(x, y), (x + 18, y)], line.style);
        area.draw(&swatch).map_err(failed)?;
        if let Some(marker) = line.marker {
            marker.draw(area, (x + 9, y), line.style)?;
        }
        let style = text(15, INK).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw_text(line.name, &style, (x + 26, y))
            .map_err(failed)?;
    }
    Ok(())
}

/// Says what the picture cannot show.
fn draw_note(area: &Area, lines: &[Line]) -> Result<()> {
    let mut note = String::new();
    for line in lines {
        if line.missing > 0 {
            let separator = if note.is_empty() {
                "not finite: "
            } else {
                ", "
            };
            // Writing to a string cannot fail.
            let _ = write!(note, "{separator}{} of {}", line.missing, line.name);
        }
    }
    if lines
        .iter()
        .all(|line| line.points.is_empty() && line.missing == 0)
    {
        note.push_str("no losses were recorded");
    }
    if note.is_empty() {
        return Ok(());
    }
    area.draw_text(&note, &text(15, COLOURS[1]), (24, 42))
        .map_err(failed)
}

/// Whether a loss has a place in a chart: it is finite, and not so large that no axis can be divided.
pub(super) fn is_drawn(loss: f64) -> bool {
    loss.abs() < 1e30
}

/// How many losses are not finite.
pub(super) fn missing(points: &[(f64, f64)]) -> usize {
    points.iter().filter(|point| !is_drawn(point.1)).count()
}

/// Heights in `room` that keep the order of `wanted` and a name's distance.
fn spread(wanted: &[i32], room: Range<i32>) -> Vec<i32> {
    let mut heights = Vec::with_capacity(wanted.len());
    let mut free = room.start;
    for &height in wanted {
        let height = height.max(free);
        heights.push(height);
        free = height.saturating_add(NAME_HEIGHT);
    }
    let mut limit = room.end;
    for height in heights.iter_mut().rev() {
        *height = limit.min(*height);
        limit = *height - NAME_HEIGHT;
    }
    heights
}

fn range_of_steps(steps: impl Iterator<Item = f64>) -> Range<f64> {
    let (least, greatest) = bounds(steps).unwrap_or((0.0, 1.0));
    if least == greatest {
        (least - 1.0).max(0.0)..greatest + 1.0
    } else {
        // Runs begin at step 1; an axis is easier to read from 0.
        let start = if least <= 0.1 * greatest { 0.0 } else { least };
        start..greatest
    }
}

fn range_of_losses(losses: impl Iterator<Item = f64>) -> Range<f64> {
    let (least, greatest) = bounds(losses).unwrap_or((0.0, 1.0));
    let room = if greatest - least > 1e-9 * greatest.abs() {
        0.05 * (greatest - least)
    } else {
        (0.1 * greatest.abs()).max(0.1)
    };
    // A loss is not negative, and the axis should not suggest that it could be.
    let start = if least >= 0.0 {
        (least - room).max(0.0)
    } else {
        least - room
    };
    start..greatest + room
}

fn bounds(numbers: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    numbers
        .filter(|number| is_drawn(*number))
        .fold(None, |bounds, number| {
            let (least, greatest) = bounds.unwrap_or((number, number));
            Some((number.min(least), number.max(greatest)))
        })
}

/// Enough decimals to tell the labels of an axis apart.
fn decimals_for(range: &Range<f64>) -> usize {
    let distance = (range.end - range.start) / 8.0;
    (1.0 - distance.log10()).clamp(0.0, 6.0) as usize
}

/// 1500 as `1,500`; nothing between two steps.
fn step_label(step: f64) -> String {
    if step.fract() != 0.0 {
        return String::new();
    }
    indicatif::HumanCount(step as u64).to_string()
}

fn text(size: i32, colour: RGBColor) -> TextStyle<'static> {
    // plotters draws text at four fifths of the size it is told.
    ("sans-serif", f64::from(size) * 1.24)
        .into_font()
        .color(&colour)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::new(format!("cannot draw the picture: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_overlap() {
        assert_eq!(spread(&[100, 200], 0..400), [100, 200]);
        assert_eq!(spread(&[100, 101, 102], 0..400), [100, 120, 140]);
        assert_eq!(spread(&[395, 396, i32::MAX / 2], 0..400), [360, 380, 400]);
        assert_eq!(spread(&[], 0..400), [0; 0]);
    }
}
