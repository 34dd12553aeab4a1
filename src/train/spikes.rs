//! Losses that lie far above those of the steps before them: often a broken record, or the start of a divergence.

/// Losses that are remembered.
const REMEMBERED: usize = 50;
/// Fewer say nothing about the next.
const FEWEST: usize = 20;
/// Median absolute deviations above the median, seven standard deviations of normal noise.
const DEVIATIONS: f64 = 10.0;
/// Losses that hardly differ measure nothing: a spike is at least by this factor above their median.
const LEAST_FACTOR: f64 = 1.5;
/// The same near zero, in nats.
const LEAST_RISE: f64 = 0.5;

/// The loss, in nats a token, above which the next step is a spike; none as long as too few went before it.
///
/// By medians, so that one spike does not hide the next.
pub(super) fn bound(recent: &[f64]) -> Option<f64> {
    if recent.len() < FEWEST {
        return None;
    }
    let middle = median(recent.to_vec());
    let deviation = median(recent.iter().map(|loss| (loss - middle).abs()).collect());
    let bound = middle + (DEVIATIONS * deviation).max(LEAST_RISE);
    Some(bound.max(LEAST_FACTOR * middle))
}

/// Adds the loss of a step that was taken.
pub(super) fn remember(recent: &mut Vec<f64>, loss: f64) {
    recent.push(loss);
    recent.drain(..recent.len().saturating_sub(REMEMBERED));
}

/// The middle of some values, the upper one of two.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spike_is_far_above_the_usual_noise() {
        assert_eq!(bound(&[2.0; 19]), None);
        assert_eq!(bound(&[2.0; 20]), Some(3.0));
        assert_eq!(bound(&[0.01; 20]), Some(0.51));
        let noisy: Vec<f64> = (0..50)
            .map(|index| 2.0 + 0.1 * f64::from(index % 5))
            .collect();
        let usual = bound(&noisy).expect("enough");
        assert!((usual - 3.3).abs() < 0.1, "{usual}");
        // A tenth of spikes hides no other.
        let mut spiked = noisy;
        spiked[45..].fill(40.0);
        assert!(bound(&spiked).expect("enough") < 4.0);
    }

    #[test]
    fn the_last_losses_are_remembered() {
        let mut recent = Vec::new();
        (0..60).for_each(|loss| remember(&mut recent, f64::from(loss)));
        assert_eq!((recent.len(), recent[0], recent[49]), (50, 10.0, 59.0));
    }
}
