//! What a key may hold while several write and read it, by what their requests were answered.
//!
//! Requests begin and end at ticks of one counter that all of them share, so that "ended before that one began" is
//! known for certain. A write that was not acknowledged may have been done, or may be done later.

/// A tick of the shared counter.
pub type Tick = u64;

#[derive(Debug, Clone)]
struct Write {
    value: Option<u64>,
    begun: Tick,
    acknowledged: Option<Tick>,
}

/// One key: None is "no such key", a number says which body.
#[derive(Debug, Clone)]
pub struct Register {
    writes: Vec<Write>,
}

impl Default for Register {
    fn default() -> Register {
        Register { writes: vec![Write { value: None, begun: 0, acknowledged: Some(0) }] }
    }
}

impl Register {
    /// A write or delete is about to be sent.
    pub fn begin(&mut self, value: Option<u64>, now: Tick) {
        self.writes.push(Write { value, begun: now, acknowledged: None });
    }

    /// The write that began at `begun` was acknowledged.
    pub fn acknowledge(&mut self, begun: Tick, now: Tick) {
        for write in self.writes.iter_mut().filter(|write| write.begun == begun) {
            write.acknowledged = Some(now);
        }
    }

    /// Whether a read that took from `begun` to `ended` may have found this: some write of it that had begun by then,
    /// and that no other surely followed before the read began.
    pub fn may_read(&self, value: Option<u64>, begun: Tick, ended: Tick) -> bool {
        let followed = |write: &Write| {
            write.acknowledged.is_some_and(|acknowledged| {
                self.writes
                    .iter()
                    .any(|other| other.begun > acknowledged && other.acknowledged.is_some_and(|end| end < begun))
            })
        };
        self.writes.iter().any(|write| write.value == value && write.begun <= ended && !followed(write))
    }

    /// Nobody writes any more, and this was read: from now on it is what the key holds.
    pub fn settle(&mut self, value: Option<u64>, now: Tick) {
        self.writes = vec![Write { value, begun: now, acknowledged: Some(now) }];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledged_write_is_read_until_another_follows() {
        let mut key = Register::default();
        assert!(key.may_read(None, 1, 2) && !key.may_read(Some(1), 1, 2));
        key.begin(Some(1), 3);
        assert!(key.may_read(None, 4, 5) && key.may_read(Some(1), 4, 5));
        key.acknowledge(3, 6);
        assert!(key.may_read(Some(1), 7, 8) && !key.may_read(None, 7, 8));
        assert!(key.may_read(None, 5, 8), "a read that began before the write was acknowledged");
        key.begin(None, 9);
        key.acknowledge(9, 10);
        assert!(key.may_read(None, 11, 12) && !key.may_read(Some(1), 11, 12), "a lost delete");
    }

    #[test]
    fn of_two_at_the_same_time_either_may_be_the_last() {
        let mut key = Register::default();
        key.begin(Some(1), 1);
        key.begin(Some(2), 2);
        key.acknowledge(2, 3);
        key.acknowledge(1, 4);
        assert!(key.may_read(Some(1), 5, 6) && key.may_read(Some(2), 5, 6) && !key.may_read(None, 5, 6));
    }

    #[test]
    fn a_write_in_doubt_may_be_read_at_any_later_time_until_it_is_settled() {
        let mut key = Register::default();
        key.begin(Some(1), 1);
        key.begin(Some(2), 2);
        key.acknowledge(2, 3);
        assert!(key.may_read(Some(1), 4, 5) && key.may_read(Some(2), 4, 5) && !key.may_read(None, 4, 5));
        assert!(!key.may_read(Some(3), 4, 5));
        key.settle(Some(1), 6);
        assert!(key.may_read(Some(1), 7, 8) && !key.may_read(Some(2), 7, 8));
    }
}
