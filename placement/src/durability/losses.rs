//! The chain of one placement group: which of its chunks are missing, how they come back, and when that is too late.
//!
//! A state is (chunks missing with their disks, chunks missing with their servers), at most M together. A loss is more
//! than M missing, or fewer with bad chunks of one extent that no scrub has found yet.

use super::chain::Chain;
use super::input::Cluster;
use super::layout::choose;

/// Losses per year, by what they come from.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct ByCause {
    /// Single disks alone.
    pub disks: f64,
    /// At least one whole server among the lost.
    pub servers: f64,
    /// A latent error met too late.
    pub latent: f64,
}

/// For how much a loss counts, and how many extents a latent error may hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    /// One extent in one group.
    OneExtent,
    /// All extents of all groups; groups that share the lost disks are lost together and count once.
    Everything,
}

/// The states of a group with at most `m` chunks missing, fewer missing first.
struct States {
    list: Vec<(usize, usize)>,
}

impl States {
    fn new(m: usize) -> States {
        States { list: (0..=m).flat_map(|all| (0..=all).map(move |servers| (all - servers, servers))).collect() }
    }

    fn number(&self, disks: usize, servers: usize) -> usize {
        let all = disks + servers;
        all * (all + 1) / 2 + servers
    }
}

/// Losses per year, as that view counts them.
pub(super) fn losses(cluster: &Cluster, view: View) -> ByCause {
    let group = Group::new(cluster, view);
    let states = States::new(group.m);
    // Classes: too many missing, then latent errors, each by the state that it counts for.
    let fatal = States::new(group.m + group.per_server);
    let classes = fatal.list.len();
    let mut chain = Chain::new(states.list.len());
    for (here, &(disks, servers)) in states.list.iter().enumerate() {
        let missing = disks + servers;
        let mut arrive = |to: (usize, usize), rate: f64| {
            let (class, now) = (fatal.number(to.0, to.1), to.0 + to.1);
            if now > group.m {
                chain.lose(here, class, rate);
                return;
            }
            let bad = group.met_by_bad(missing, to);
            chain.lose(here, classes + class, rate * bad);
            chain.add(here, states.number(to.0, to.1), rate * (1.0 - bad));
        };
        let good = (group.width - missing) as f64;
        arrive((disks + 1, servers), good * group.disk_rate);
        for (taken, rate) in group.server_events(disks, servers) {
            arrive((disks, servers + taken), rate);
        }
        let new_errors = group.new_errors(disks, servers);
        chain.lose(here, classes + fatal.number(disks, servers), new_errors);
        if disks > 0 {
            chain.add(here, states.number(disks - 1, servers), disks as f64 / cluster.hours_after_disk(missing));
        }
        if servers > 0 {
            // The whole server comes back at its pace, single slots of it sooner when they are urgent.
            let (whole, urgent) = (1.0 / cluster.hours_after_server(1), 1.0 / cluster.hours_after_server(missing));
            let at_once = group.per_server.min(servers);
            let back = states.number(disks, servers - at_once);
            chain.add(here, back, servers as f64 / at_once as f64 * whole);
            chain.add(here, states.number(disks, servers - 1), servers as f64 * (urgent - whole).max(0.0));
        }
    }
    let run = chain.long_run(2 * classes);
    let mut sum = ByCause::default();
    for (class, &(disks, servers)) in fatal.list.iter().enumerate() {
        let weight = super::input::HOURS_PER_YEAR * group.weight(disks, servers);
        let cause = if servers > 0 { &mut sum.servers } else { &mut sum.disks };
        *cause += weight * run.losses[class];
        sum.latent += weight * run.losses[classes + class];
    }
    sum
}

/// Rates and numbers of one group.
struct Group<'c> {
    cluster: &'c Cluster,
    view: View,
    width: usize,
    m: usize,
    per_server: usize,
    disk_rate: f64,
    server_rate: f64,
    /// Latent errors of one good chunk per hour.
    error_rate: f64,
    /// Part of the time that a chunk which is there has a latent error.
    bad: f64,
}

impl Group<'_> {
    fn new(cluster: &Cluster, view: View) -> Group<'_> {
        let (disk_rate, server_rate) = (cluster.disk_rate(), cluster.server_rate());
        let error_rate = cluster.latent_rate();
        // A chunk becomes good again when it is scrubbed, and when its disk or server is lost and it is rebuilt.
        let mended = 1.0 / cluster.latent_hours() + disk_rate + server_rate;
        Group {
            cluster,
            view,
            width: cluster.scheme.width(),
            m: cluster.scheme.m.into(),
            per_server: cluster.layout.chunks_per_server,
            disk_rate,
            server_rate,
            error_rate,
            bad: error_rate / (error_rate + mended),
        }
    }

    /// Groups that are lost together when these are.
    fn together(&self, disks: usize, servers: usize) -> f64 {
        match self.view {
            View::OneExtent => 1.0,
            View::Everything => self.cluster.layout.sharing(disks, servers.div_ceil(self.per_server)),
        }
    }

    /// What a loss of one group counts for.
    fn weight(&self, disks: usize, servers: usize) -> f64 {
        match self.view {
            View::OneExtent => 1.0,
            View::Everything => self.cluster.layout.groups as f64 / self.together(disks, servers),
        }
    }

    /// Extents that a state of a group concerns.
    fn extents(&self, disks: usize, servers: usize) -> f64 {
        match self.view {
            View::OneExtent => 1.0,
            View::Everything => self.cluster.latent.extents_per_group * self.together(disks, servers),
        }
    }

    /// (chunks taken, rate) for the loss of a server of the group. The chunks that single disks took are anywhere among
    /// the servers that are left.
    fn server_events(&self, disks: usize, servers: usize) -> Vec<(usize, f64)> {
        let left = self.width - servers;
        let on_it = self.per_server.min(left);
        let rate = self.server_rate * left as f64 / on_it as f64;
        let ways = choose(left as f64, on_it);
        let event = |gone: usize| {
            let part = choose(disks as f64, gone) * choose((left - disks) as f64, on_it - gone) / ways;
            (on_it - gone, rate * part)
        };
        (0..=disks.min(on_it)).map(event).filter(|(taken, rate)| *taken > 0 && *rate > 0.0).collect()
    }

    /// Probability that exactly `bad` of `chunks` have a latent error.
    fn exactly(&self, bad: usize, chunks: usize) -> f64 {
        let good = chunks as f64 - bad as f64;
        choose(chunks as f64, bad) * self.bad.powi(bad as i32) * ((-self.bad).ln_1p() * good).exp()
    }

    /// Probability that some extent has more bad chunks than the state can bear in which the group arrives; those that
    /// the state before could not bear were lost then.
    fn met_by_bad(&self, before: usize, (disks, servers): (usize, usize)) -> f64 {
        let now = disks + servers;
        let one: f64 = (self.m + 1 - now..=self.m - before).map(|bad| self.exactly(bad, self.width - now)).sum();
        any_of(one, self.extents(disks, servers))
    }

    /// Per hour: an extent that has as many bad chunks as the state can bear gets one more.
    fn new_errors(&self, disks: usize, servers: usize) -> f64 {
        let missing = disks + servers;
        let (bear, there) = (self.m - missing, self.width - missing);
        let still_good = (there - bear) as f64;
        self.extents(disks, servers) * self.exactly(bear, there) * still_good * self.error_rate
    }
}

/// Probability that it happens to at least one of `many`, when it happens to each with probability `one`.
pub(super) fn any_of(one: f64, many: f64) -> f64 {
    -((-one.min(1.0)).ln_1p() * many).exp_m1()
}
