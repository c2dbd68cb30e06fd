//! Up, Suspect, Down: what a series of pings and errors says about a disk. Pure: the clock comes in.

use super::DiskSettings;
use granary_wire::control::NodeStatus;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Whether a disk answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskHealth {
    /// It answers.
    Up,
    /// New, or an error was seen a moment ago: asked, but not relied on.
    Suspect,
    /// It does not answer; asked only when nobody else can help.
    Down,
}

/// Pings that find no place say nothing for so long; then they count as unanswered. Anybody at the disk's address can
/// say that it is busy, without a proof.
pub(super) const BUSY_FOR: Duration = Duration::from_secs(60);

/// What is known about one disk's health.
#[derive(Debug)]
pub(super) struct State {
    health: DiskHealth,
    failing_since: Option<Instant>,
    busy_since: Option<Instant>,
    last_service_error: Option<Instant>,
    unwritable_until: Option<Instant>,
    full_until: Option<Instant>,
    pinged: bool,
    times_up: u64,
    status: Option<NodeStatus>,
    last_error: Option<String>,
}

impl Default for State {
    fn default() -> State {
        State {
            health: DiskHealth::Suspect,
            failing_since: None,
            busy_since: None,
            last_service_error: None,
            unwritable_until: None,
            full_until: None,
            pinged: false,
            times_up: 0,
            status: None,
            last_error: None,
        }
    }
}

impl State {
    pub(super) fn health(&self) -> DiskHealth {
        self.health
    }

    pub(super) fn was_pinged(&self) -> bool {
        self.pinged
    }

    pub(super) fn times_up(&self) -> u64 {
        self.times_up
    }

    pub(super) fn status(&self) -> Option<&NodeStatus> {
        self.status.as_ref()
    }

    pub(super) fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    pub(super) fn is_unwritable(&self, now: Instant) -> bool {
        self.unwritable_until.is_some_and(|until| now < until)
    }

    /// Has it refused a client's chunk for want of room a moment ago? Repairs may fill it further.
    pub(super) fn is_full_for_clients(&self, now: Instant) -> bool {
        self.full_until.is_some_and(|until| now < until)
    }

    pub(super) fn full_until(&mut self, until: Instant) {
        self.full_until = Some(until);
    }

    pub(super) fn unwritable_until(&mut self, until: Instant) {
        self.unwritable_until = Some(until);
    }

    /// An error of a request or a ping. `refused`: nobody (or the wrong disk) is there at all.
    pub(super) fn error(&mut self, now: Instant, refused: bool, error: &str, settings: &DiskSettings) {
        let since = *self.failing_since.get_or_insert(now);
        self.last_service_error = Some(now);
        self.last_error = Some(error.chars().take(200).collect());
        self.pinged = true;
        if refused || now.duration_since(since) >= settings.down_after {
            self.health = DiskHealth::Down;
        } else if self.health == DiskHealth::Up {
            self.health = DiskHealth::Suspect;
        }
    }

    /// A ping that found no place.
    pub(super) fn busy(&mut self, now: Instant, settings: &DiskSettings) {
        let since = *self.busy_since.get_or_insert(now);
        if now.duration_since(since) >= BUSY_FOR {
            self.error(now, false, "busy for a minute, and no ping was answered", settings);
        }
    }

    /// A good ping.
    pub(super) fn pinged(&mut self, now: Instant, status: NodeStatus, settings: &DiskSettings) {
        self.status = Some(status);
        self.busy_since = None;
        self.pinged = true;
        let held = self.last_service_error.is_some_and(|at| now.duration_since(at) < settings.suspect_hold);
        match self.health {
            DiskHealth::Up => self.failing_since = None,
            DiskHealth::Suspect if held && self.times_up > 0 => self.failing_since = None,
            DiskHealth::Suspect | DiskHealth::Down => {
                if self.health == DiskHealth::Down || self.times_up == 0 {
                    self.times_up += 1;
                }
                self.health = DiskHealth::Up;
                self.failing_since = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::disks::tests::status;
    use std::time::Duration;

    #[test]
    fn an_error_makes_an_up_disk_suspect_at_once_and_pings_bring_it_back_after_the_hold() {
        let (settings, start) = (DiskSettings::default(), Instant::now());
        let mut state = State::default();
        state.pinged(start, status(), &settings);
        assert_eq!((state.health(), state.times_up()), (DiskHealth::Up, 1));
        state.error(start, false, "slow", &settings);
        assert_eq!(state.health(), DiskHealth::Suspect);
        state.pinged(start + settings.suspect_hold / 2, status(), &settings);
        assert_eq!(state.health(), DiskHealth::Suspect, "a sick disk often answers pings");
        state.pinged(start + settings.suspect_hold, status(), &settings);
        assert_eq!((state.health(), state.times_up()), (DiskHealth::Up, 1), "it was never Down");
    }

    #[test]
    fn errors_without_a_good_ping_between_lead_to_down_and_a_good_ping_back_up() {
        let (settings, start) = (DiskSettings::default(), Instant::now());
        let mut state = State::default();
        state.pinged(start, status(), &settings);
        state.error(start, false, "timeout", &settings);
        state.error(start + settings.down_after - Duration::from_millis(1), false, "timeout", &settings);
        assert_eq!(state.health(), DiskHealth::Suspect);
        state.error(start + settings.down_after, false, "timeout", &settings);
        assert_eq!(state.health(), DiskHealth::Down);
        state.pinged(start + settings.down_after, status(), &settings);
        assert_eq!((state.health(), state.times_up()), (DiskHealth::Up, 2));
    }

    #[test]
    fn a_busy_disk_is_well_for_a_minute_and_then_as_one_that_does_not_answer() {
        let (settings, start) = (DiskSettings::default(), Instant::now());
        let mut state = State::default();
        state.pinged(start, status(), &settings);
        for ms in (0..BUSY_FOR.as_millis() as u64).step_by(1_000) {
            state.busy(start + Duration::from_millis(ms), &settings);
            assert_eq!(state.health(), DiskHealth::Up);
        }
        state.pinged(start + BUSY_FOR, status(), &settings);
        let again = start + BUSY_FOR;
        state.busy(again, &settings);
        assert_eq!(state.health(), DiskHealth::Up, "it answered between");
        state.busy(again + BUSY_FOR, &settings);
        assert_eq!(state.health(), DiskHealth::Suspect);
        state.busy(again + BUSY_FOR + settings.down_after, &settings);
        assert_eq!(state.health(), DiskHealth::Down);
        state.pinged(again + BUSY_FOR * 2, status(), &settings);
        assert_eq!(state.health(), DiskHealth::Up);
    }

    #[test]
    fn a_refused_connection_is_down_at_once() {
        let (settings, start) = (DiskSettings::default(), Instant::now());
        let mut state = State::default();
        state.error(start, true, "connection refused", &settings);
        assert_eq!(state.health(), DiskHealth::Down);
        assert!(state.was_pinged(), "whoever waits for readiness need not wait for a dead disk");
    }
}
