//! Whether a step may touch the weights, and by how much its gradients are scaled. On a GPU `judge` in `adamw.cu` decides
//! the same, to the bit, so that nobody waits for its sums.

/// What is wrong with a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// Its loss or its gradient is not finite. Such a step never touches the weights.
    NotFinite,
    /// Its loss lies far above those of the steps before it.
    Spike {
        /// The loss, in nats a token, up to which it would have been like them.
        bound: f64,
    },
}

/// What becomes of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    /// The weights move.
    Take,
    /// The weights stay as they are, and the run goes on.
    LeaveOut,
    /// The weights stay as they are, and the run ends.
    EndRun,
}

/// What a step is judged by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepLimits {
    /// Its target tokens, over which losses and gradients are means.
    pub target_tokens: usize,
    /// A mean gradient longer than this is scaled down to it; 0 leaves it alone.
    pub gradient_norm: f64,
    /// The mean loss, in nats a token, above which the step is a spike, if that can be said.
    pub loss: Option<f64>,
    /// What becomes of a step that is not finite.
    pub on_nonfinite: Reaction,
    /// What becomes of a spike.
    pub on_spike: Reaction,
}

/// A step that has been judged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// Mean loss of its target tokens, in nats.
    pub loss: f64,
    /// Norm of the mean gradient, before clipping.
    pub gradient_norm: f64,
    /// Factor that makes the sum of gradients their mean, clipped.
    pub gradient_scale: f32,
    /// What is wrong with it, if anything is.
    pub fault: Option<Fault>,
    /// What has become of it.
    pub reaction: Reaction,
}

impl StepLimits {
    /// Divides the sum of the losses and the norm of the sum of gradients by the target tokens, and finds how to clip as
    /// `torch.nn.utils.clip_grad_norm_` does.
    pub fn judge(&self, loss_sum: f64, squared_norm: f64) -> Verdict {
        let target_tokens = self.target_tokens as f64;
        let loss = loss_sum / target_tokens;
        let gradient_norm = squared_norm.sqrt() / target_tokens;
        let clip = if self.gradient_norm > 0.0 {
            (self.gradient_norm / (gradient_norm + 1e-6)).min(1.0)
        } else {
            1.0
        };
        let fault = match self.loss {
            _ if !(loss.is_finite() && gradient_norm.is_finite()) => Some(Fault::NotFinite),
            Some(bound) if loss > bound => Some(Fault::Spike { bound }),
            _ => None,
        };
        Verdict {
            loss,
            gradient_norm,
            gradient_scale: (clip / target_tokens) as f32,
            fault,
            reaction: match fault {
                None => Reaction::Take,
                Some(Fault::NotFinite) => self.on_nonfinite,
                Some(Fault::Spike { .. }) => self.on_spike,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: StepLimits = StepLimits {
        target_tokens: 4,
        gradient_norm: 1.0,
        loss: Some(3.0),
        on_nonfinite: Reaction::EndRun,
        on_spike: Reaction::LeaveOut,
    };

    #[test]
    fn sums_become_means_and_long_gradients_are_clipped() {
        let verdict = LIMITS.judge(8.0, 64.0);
        assert_eq!((verdict.loss, verdict.gradient_norm), (2.0, 2.0));
        let clip: f64 = 1.0 / (2.0 + 1e-6);
        assert_eq!(verdict.gradient_scale, (clip / 4.0) as f32);
        assert_eq!(LIMITS.judge(8.0, 4.0).gradient_scale, 0.25, "short enough");
        let unlimited = StepLimits {
            gradient_norm: 0.0,
            ..LIMITS
        };
        assert_eq!(unlimited.judge(8.0, 64.0).gradient_scale, 0.25);
    }

    #[test]
    fn each_fault_has_its_reaction() {
        let judged = |loss_sum, squared_norm| {
            let verdict = LIMITS.judge(loss_sum, squared_norm);
            (verdict.fault, verdict.reaction)
        };
        assert_eq!(judged(12.0, 1.0), (None, Reaction::Take));
        let spike = Some(Fault::Spike { bound: 3.0 });
        assert_eq!(judged(12.1, 1.0), (spike, Reaction::LeaveOut));
        for (loss_sum, squared_norm) in [
            (f64::NAN, 1.0),
            (f64::INFINITY, 1.0),
            (1.0, f64::NAN),
            (1.0, f64::INFINITY),
        ] {
            assert_eq!(
                judged(loss_sum, squared_norm),
                (Some(Fault::NotFinite), Reaction::EndRun)
            );
        }
        let unbounded = StepLimits {
            loss: None,
            ..LIMITS
        };
        assert_eq!(unbounded.judge(1e9, 1.0).fault, None);
    }
}
