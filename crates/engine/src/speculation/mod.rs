//! Guessing ahead: several tokens are guessed, and one step of the model says which of them are right.
//!
//! A step that was fed the guesses chooses after each of them, as it would without: by the same logits, the same parameters
//! and the same number, so by the same random number. A guess is right if it is the token that was chosen before it, and the
//! first that is not ends the step with the token that was chosen in its place. So an answer is the same with and
//! without, token for token, also where it is sampled; for a guess that is certain this is rejection sampling (Leviathan,
//! Kalman and Matias, 2023, with a point mass as the proposal), and for one that a draft model samples with the same random
//! number it is the coupling of Daliri, Musco and Suresh (2024).
//!
//! What is guessed costs time. [`Costs`] has what steps were measured to take, [`Acceptance`] how often guesses were right, and
//! what does not pay by these is not guessed. What is thought to pay may not, and what is not has to be tried at times:
//! [`Account`] bounds what an answer loses by that.

mod account;
mod config;
mod draft;
mod lookup;
mod policy;

pub(crate) use self::account::Account;
pub use self::config::{DraftConfig, LookupConfig, SpeculationConfig};
#[cfg(feature = "mlx")]
pub(crate) use self::draft::same_vocabulary;
pub(crate) use self::draft::{Asked, Drafter};
pub(crate) use self::lookup::look_up;
pub(crate) use self::policy::{Acceptance, Base, Costs, Usual};
