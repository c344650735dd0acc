//! The circuit breaker: a state machine that is told the time.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::BreakerConfiguration;

/// Outcomes that are remembered at most.
const REMEMBERED: usize = 1024;

/// The state of a circuit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerState {
    /// Requests pass.
    Closed,
    /// Requests are refused.
    Open,
    /// A few requests pass, and decide.
    HalfOpen,
}

/// Leave to send one request, with the period of the circuit that it was given in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pass {
    period: u64,
}

/// What came of a request that had leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Success,
    Fault,
    /// It says nothing about the engine: the caller left, or asked for what cannot be.
    Nothing,
}

#[derive(Debug)]
enum State {
    Closed { outcomes: VecDeque<(Duration, Verdict)> },
    Open { until: Duration },
    HalfOpen { running: u32, successes: u32 },
}

/// Closed, it lets every request pass and opens when too many of them failed lately. Open, it lets none pass for a while.
/// Half open, it lets a few pass: one fault opens it again, enough successes close it.
///
/// A change of state begins a period; what comes of a request from an earlier one is of no account.
#[derive(Debug)]
pub(crate) struct CircuitBreaker {
    configuration: BreakerConfiguration,
    state: State,
    period: u64,
}

impl CircuitBreaker {
    pub(crate) fn new(configuration: BreakerConfiguration) -> Self {
        Self {
            configuration,
            state: closed(),
            period: 0,
        }
    }

    /// Asks for leave to send a request.
    ///
    /// # Errors
    ///
    /// When it is worth asking again.
    pub(crate) fn admit(&mut self, now: Duration) -> Result<Pass, Duration> {
        self.look(now);
        match &mut self.state {
            State::Closed { .. } => {}
            State::Open { until } => return Err(until.saturating_sub(now)),
            State::HalfOpen { running, successes } => {
                // As many as have to succeed.
                if *running + *successes >= self.configuration.trials {
                    return Err(self.configuration.open_for);
                }
                *running += 1;
            }
        }
        Ok(Pass { period: self.period })
    }

    /// Hears what came of a request. True where that opened the circuit.
    pub(crate) fn record(&mut self, now: Duration, pass: Pass, verdict: Verdict) -> bool {
        if pass.period != self.period {
            return false;
        }
        match &mut self.state {
            State::Closed { outcomes } => {
                if verdict == Verdict::Nothing {
                    return false;
                }
                if outcomes.len() == REMEMBERED {
                    outcomes.pop_front();
                }
                outcomes.push_back((now, verdict));
                let window = self.configuration.window;
                outcomes.retain(|(at, _)| now.saturating_sub(*at) < window);
                let faults = outcomes
                    .iter()
                    .filter(|(_, verdict)| *verdict == Verdict::Fault)
                    .count();
                let enough = outcomes.len() >= self.configuration.min_requests as usize;
                let rate = faults as f64 / outcomes.len() as f64;
                if verdict == Verdict::Fault && enough && rate >= self.configuration.failure_rate {
                    self.open(now);
                    return true;
                }
            }
            // A request that has leave in a period that gives none.
            State::Open { .. } => {}
            State::HalfOpen { running, successes } => {
                *running = running.saturating_sub(1);
                match verdict {
                    Verdict::Nothing => {}
                    Verdict::Fault => {
                        self.open(now);
                        return true;
                    }
                    Verdict::Success => {
                        *successes += 1;
                        if *successes >= self.configuration.trials {
                            self.change(closed());
                        }
                    }
                }
            }
        }
        false
    }

    /// Closes it, because the engine was proved to work.
    pub(crate) fn reset(&mut self) {
        self.change(closed());
    }

    pub(crate) fn state(&mut self, now: Duration) -> BreakerState {
        self.look(now);
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// An open circuit whose time is over is half open.
    fn look(&mut self, now: Duration) {
        if let State::Open { until } = self.state
            && now >= until
        {
            self.change(State::HalfOpen {
                running: 0,
                successes: 0,
            });
        }
    }

    fn open(&mut self, now: Duration) {
        self.change(State::Open {
            until: now.saturating_add(self.configuration.open_for),
        });
    }

    fn change(&mut self, state: State) {
        self.state = state;
        self.period += 1;
    }
}

fn closed() -> State {
    State::Closed {
        outcomes: VecDeque::new(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use BreakerState::{Closed, HalfOpen, Open};

    const SECOND: Duration = Duration::from_secs(1);

    fn configuration() -> BreakerConfiguration {
        BreakerConfiguration {
            window: SECOND * 10,
            min_requests: 4,
            failure_rate: 0.5,
            open_for: SECOND * 5,
            trials: 2,
        }
    }

    fn run(breaker: &mut CircuitBreaker, now: Duration, verdict: Verdict) -> bool {
        let pass = breaker.admit(now).unwrap_or(Pass { period: u64::MAX });
        breaker.record(now, pass, verdict)
    }

    #[test]
    fn it_opens_waits_tries_and_closes() {
        let mut breaker = CircuitBreaker::new(configuration());
        let now = SECOND;
        assert!(!run(&mut breaker, now, Verdict::Success));
        assert!(!run(&mut breaker, now, Verdict::Success));
        assert!(!run(&mut breaker, now, Verdict::Fault));
        assert!(!run(&mut breaker, now, Verdict::Nothing));
        assert!(run(&mut breaker, now, Verdict::Fault), "2 of 4");
        assert_eq!(breaker.admit(now + SECOND), Err(SECOND * 4));
        let now = now + SECOND * 5;
        let first = breaker.admit(now).unwrap();
        let second = breaker.admit(now).unwrap();
        assert_eq!(breaker.state(now), HalfOpen);
        assert!(breaker.admit(now).is_err(), "two are on trial");
        // One who leaves makes room for another.
        breaker.record(now, first, Verdict::Nothing);
        let third = breaker.admit(now).unwrap();
        breaker.record(now, second, Verdict::Success);
        breaker.record(now, third, Verdict::Success);
        assert_eq!(breaker.state(now), Closed);
        // The old faults are forgotten.
        assert!(!run(&mut breaker, now, Verdict::Fault));
    }

    #[test]
    fn a_fault_on_trial_opens_it_again() {
        let mut breaker = CircuitBreaker::new(configuration());
        for _ in 0..4 {
            run(&mut breaker, SECOND, Verdict::Fault);
        }
        assert_eq!(breaker.state(SECOND), Open);
        assert!(run(&mut breaker, SECOND * 6, Verdict::Fault));
        assert_eq!(breaker.admit(SECOND * 6), Err(SECOND * 5));
        breaker.reset();
        assert_eq!(breaker.state(SECOND * 6), Closed);
    }

    #[test]
    fn what_comes_of_an_earlier_period_is_of_no_account() {
        let mut breaker = CircuitBreaker::new(configuration());
        let late = breaker.admit(SECOND).unwrap();
        for _ in 0..4 {
            run(&mut breaker, SECOND, Verdict::Fault);
        }
        breaker.record(SECOND * 6, late, Verdict::Success);
        assert_eq!(breaker.state(SECOND * 6), HalfOpen);
        assert!(breaker.admit(SECOND * 6).is_ok() && breaker.admit(SECOND * 6).is_ok());
        assert!(!breaker.record(SECOND * 6, late, Verdict::Fault));
        assert_eq!(breaker.state(SECOND * 6), HalfOpen);
    }

    #[test]
    fn faults_leave_the_window() {
        let mut breaker = CircuitBreaker::new(configuration());
        for second in [1, 2, 3] {
            assert!(!run(&mut breaker, SECOND * second, Verdict::Fault));
        }
        assert!(
            !run(&mut breaker, SECOND * 11, Verdict::Fault),
            "the first is 10 s old"
        );
        assert!(!run(&mut breaker, SECOND * 30, Verdict::Fault), "all are");
    }

    #[derive(Clone, Debug)]
    enum Act {
        Wait(u64),
        Admit,
        /// The request of this number, modulo those that run, ends so.
        End(usize, Verdict),
        Reset,
    }

    fn act() -> impl Strategy<Value = Act> {
        let verdict = prop_oneof![
            3 => Just(Verdict::Fault),
            3 => Just(Verdict::Success),
            1 => Just(Verdict::Nothing),
        ];
        prop_oneof![
            4 => (0..3_000_u64).prop_map(Act::Wait),
            8 => Just(Act::Admit),
            8 => (any::<usize>(), verdict).prop_map(|(at, verdict)| Act::End(at, verdict)),
            1 => Just(Act::Reset),
        ]
    }

    /// The rules, said the long way: everything that ever happened is kept and looked through.
    #[derive(Default)]
    struct Model {
        /// When each period began, and its state.
        periods: Vec<(Duration, BreakerState)>,
        /// Period, time and verdict of what ended.
        ended: Vec<(usize, Duration, Verdict)>,
        /// The period of each request that runs.
        running: Vec<usize>,
    }

    impl Model {
        fn now(&self) -> (usize, Duration, BreakerState) {
            let last = self.periods.len() - 1;
            (last, self.periods[last].0, self.periods[last].1)
        }

        fn look(&mut self, now: Duration, rules: &BreakerConfiguration) {
            let (_, began, state) = self.now();
            if state == Open && now >= began + rules.open_for {
                self.periods.push((now, HalfOpen));
            }
        }

        fn succeeded(&self, period: usize) -> usize {
            let of = |entry: &&(usize, Duration, Verdict)| entry.0 == period && entry.2 == Verdict::Success;
            self.ended.iter().filter(of).count()
        }

        fn may_pass(&self, rules: &BreakerConfiguration) -> bool {
            let (period, _, state) = self.now();
            let running = self.running.iter().filter(|of| **of == period).count();
            match state {
                Closed => true,
                Open => false,
                HalfOpen => running + self.succeeded(period) < rules.trials as usize,
            }
        }

        fn end(&mut self, at: usize, now: Duration, verdict: Verdict, rules: &BreakerConfiguration) {
            let of = self.running.remove(at);
            self.ended.push((of, now, verdict));
            let (period, _, state) = self.now();
            if of != period {
                return;
            }
            let recent: Vec<_> = (self.ended.iter())
                .filter(|(of, at, verdict)| {
                    *of == period && now.saturating_sub(*at) < rules.window && *verdict != Verdict::Nothing
                })
                .collect();
            let faults = recent.iter().filter(|entry| entry.2 == Verdict::Fault).count();
            let many = recent.len() >= rules.min_requests as usize
                && faults as f64 >= rules.failure_rate * recent.len() as f64;
            match (state, verdict) {
                (Closed, Verdict::Fault) if many => self.periods.push((now, Open)),
                (HalfOpen, Verdict::Fault) => self.periods.push((now, Open)),
                (HalfOpen, Verdict::Success) if self.succeeded(period) >= rules.trials as usize => {
                    self.periods.push((now, Closed));
                }
                _ => {}
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn it_follows_its_rules(
            acts in prop::collection::vec(act(), 0..300), min_requests in 1..6_u32, trials in 1..4_u32, quarters in 1..=4_u32,
        ) {
            let rules = BreakerConfiguration {
                min_requests, trials, failure_rate: f64::from(quarters) / 4.0, ..configuration()
            };
            let mut breaker = CircuitBreaker::new(rules.clone());
            let mut model = Model { periods: vec![(Duration::ZERO, Closed)], ..Model::default() };
            let mut passes = Vec::new();
            let mut now = Duration::ZERO;
            for act in acts {
                match act {
                    Act::Wait(by) => now += Duration::from_millis(by),
                    Act::Admit => {
                        model.look(now, &rules);
                        let admitted = breaker.admit(now);
                        prop_assert_eq!(admitted.is_ok(), model.may_pass(&rules));
                        if let Err(after) = admitted {
                            prop_assert!(after <= rules.open_for && !after.is_zero());
                        }
                        if let Ok(pass) = admitted {
                            passes.push(pass);
                            model.running.push(model.now().0);
                        }
                    }
                    Act::End(at, verdict) if !passes.is_empty() => {
                        let at = at % passes.len();
                        let before = model.now().0;
                        let opened = breaker.record(now, passes.remove(at), verdict);
                        model.end(at, now, verdict, &rules);
                        prop_assert_eq!(opened, model.now().0 > before && model.now().2 == Open);
                    }
                    Act::End(..) => {}
                    Act::Reset => {
                        breaker.reset();
                        model.periods.push((now, Closed));
                    }
                }
                model.look(now, &rules);
                prop_assert_eq!(breaker.state(now), model.now().2);
            }
        }
    }
}
