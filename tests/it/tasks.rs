//! A run as tasks over a plan: whatever their number and order, the tables are those of one run.

use lookalike::schema::TableName;

use crate::days::{DAY_ROWS, DAYS, Days, K, ROWS, Tables, assert_same};
use crate::servers::s3;
use crate::support::{Ran, Random, image_table, rows, write};

/// The steps between commits, and the commit after them.
const STAGES: [(&[&[&str]], &str); 4] = [
    (&[&["embed"]], "embed"),
    (&[&["neighbors", "--step", "sort"]], "sort"),
    (
        &[&["neighbors", "--step", "probe"], &["neighbors", "--step", "join"], &["neighbors", "--step", "merge"]],
        "neighbors",
    ),
    (&[&["flag"]], "flag"),
];

/// The days, and where a plan for the tables `out` goes.
struct Planned<'d> {
    days: &'d Days,
    out: String,
    pipeline: String,
    plan: String,
}

impl<'d> Planned<'d> {
    fn new(days: &'d Days, out: &str, more: &str) -> Self {
        let pipeline = format!("{out}.toml");
        write(&days.folder().join(&pipeline), &format!("{}{more}", days.pipeline("images", out)));
        let plan = format!("{}/{}/plans/{out}", days.bucket.url, days.prefix);
        Self { days, out: out.to_owned(), pipeline, plan }
    }

    fn plan(&self, args: &[&str]) -> Ran {
        let plan = ["plan", &self.pipeline, "--plan", &self.plan];
        self.days.bucket.lookalike(self.days.folder(), &[&plan, args].concat())
    }

    fn task(&self, step: &[&str], index: usize, count: usize) -> Ran {
        let (index, count) = (index.to_string(), count.to_string());
        let task = ["--plan", &self.plan, "--task-index", &index, "--task-count", &count];
        self.days.bucket.lookalike(self.days.folder(), &[step, &task].concat())
    }

    fn commit(&self, stage: &str) -> Ran {
        let commit = ["commit", "--plan", &self.plan, "--stage", stage];
        self.days.bucket.lookalike(self.days.folder(), &commit)
    }

    /// Runs a step's tasks in any order, some of them twice, two at a time.
    fn step(&self, step: &[&str], count: usize, random: &mut Random) {
        let mut waiting: Vec<usize> = (0..count).chain(0..count.div_ceil(2)).collect();
        while !waiting.is_empty() {
            let mut next = || {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small number")]
                let place = (random.fraction() * waiting.len() as f64) as usize;
                (place < waiting.len()).then(|| waiting.swap_remove(place))
            };
            let (one, two) = (next(), next());
            std::thread::scope(|scope| {
                let two = two.map(|index| scope.spawn(move || self.task(step, index, count).expect(0)));
                one.map(|index| self.task(step, index, count).expect(0));
                two.map(|task| task.join().unwrap());
            });
        }
    }

    /// Plans, and runs everything.
    fn run(&self, args: &[&str], count: usize, random: &mut Random) -> serde_json::Value {
        let planned = self.plan(args).expect(0).summary();
        assert_eq!(planned["status"], "planned", "{planned}");
        let mut last = planned;
        for (steps, stage) in STAGES {
            for step in steps {
                self.step(step, count, random);
            }
            last = self.commit(stage).expect(0).summary();
        }
        last
    }
}

/// A text without the lines that begin so.
fn without_lines(text: &str, beginnings: &[&str]) -> String {
    let is_kept = |line: &&str| !beginnings.iter().any(|beginning| line.starts_with(beginning));
    text.split_inclusive('\n').filter(is_kept).collect()
}

fn assert_rows(tables: &Tables, out: &str) {
    let counts: Vec<_> = tables.iter().map(|(name, rows)| (*name, rows.len())).collect();
    let expected =
        [("anomalies", ROWS), ("groups", ROWS), ("latents", ROWS), ("neighbors", K * ROWS), ("runs", DAYS.len())];
    assert_eq!(counts, expected, "{out}");
}

#[test]
fn any_number_of_tasks_in_any_order_and_some_twice_make_the_tables_of_one_run() {
    let days = Days::new(s3(), "tasks");
    let expected = days.undisturbed();
    let mut random = Random::new(3);
    for count in [1, 3, 16] {
        let planned = Planned::new(&days, &format!("of{count}"), "");
        let last = planned.run(&[], count, &mut random);
        assert_eq!(last["status"], "committed", "{last}");
        assert_eq!(last["rows_embedded"], ROWS as u64, "{last}");
        let tables = days.tables(&planned.out);
        assert_rows(&tables, &planned.out);
        assert_same(&tables, &expected, &planned.out);
        // To a run on one machine, nothing is left to do; nor to the same plan, which says so in the same words.
        assert_eq!(days.run(&planned.out, &[]).expect(0).summary()["status"], "nothing_to_do");
        assert_eq!(planned.commit("embed").expect(0).summary()["tasks"]["sort"], 0);
        assert_eq!(planned.plan(&[]).expect(0).summary()["status"], "nothing_to_do");
        assert_eq!(planned.plan(&["--skip-exit-code"]).expect(99).summary()["plan"], planned.plan.clone() + "/");
    }
}

#[test]
fn by_cells_and_with_a_reference_of_its_own_tables_tasks_do_as_one_run_does() {
    let days = Days::new(s3(), "tasks-by-cells");
    let more = |text: &str| {
        let text = text.replace("[neighbors]\n", "[neighbors]\nsearch = \"ivf\"\ncells = 9\nnprobe = 3\n");
        without_lines(&text, &["reference = "])
    };
    let pipeline = |planned: &Planned<'_>| {
        let file = days.folder().join(&planned.pipeline);
        let text = std::fs::read_to_string(&file).unwrap();
        write(&file, &more(&text));
    };
    let one = Planned::new(&days, "one", "");
    pipeline(&one);
    days.bucket.lookalike(days.folder(), &["run", &one.pipeline]).expect(0);
    let many = Planned::new(&days, "many", "");
    pipeline(&many);
    many.run(&[], 5, &mut Random::new(4));
    let (expected, found) = (days.tables("one"), days.tables("many"));
    assert_rows(&found, "many");
    assert_same(&found, &expected, "many");
    assert!(found["runs"][0].contains("neighbors_search=ivf"), "{}", found["runs"][0]);
    // What travelled is gone, and the plan has what it needs to be asked again.
    let left = days.bucket.list(&format!("{}/plans/many", days.prefix));
    assert!(left.iter().all(|name| !name.contains("/shuffle/")), "{left:?}");
    assert_eq!(many.commit("neighbors").expect(0).summary()["tasks"]["flag"], DAYS.len());
}

#[test]
fn a_plan_embeds_again_on_demand_and_otherwise_what_was_added_alone() {
    let days = Days::new(s3(), "tasks-again");
    let mut random = Random::new(5);
    let planned = Planned::new(&days, "again", "");
    planned.run(&[], 2, &mut random);
    let latents = || rows(&days.download("again"), TableName::Latents, &["run_id"]);
    let before = latents();

    let forced = Planned { plan: format!("{}-forced", planned.plan), ..Planned::new(&days, "again", "") };
    let last = forced.run(&["--force", "--partition", "ds=2026-11-02"], 2, &mut random);
    assert_eq!((&last["status"], &last["rows_embedded"]), (&"committed".into(), &(DAY_ROWS as u64).into()), "{last}");
    assert_eq!(latents(), before);

    let added = days.folder().join("added");
    let day = added.join(format!("ds={}", DAYS[1]));
    image_table(&day.join("later.parquet"), &[("later1", 901), ("later2", 902), ("later3", -1)]);
    days.bucket.upload(&added, &format!("{}/images", days.prefix));
    let grown = Planned { plan: format!("{}-grown", planned.plan), ..Planned::new(&days, "again", "") };
    let last = grown.run(&["--changed-since-last-run"], 3, &mut random);
    assert_eq!((&last["rows_in"], &last["rows_embedded"]), (&(ROWS as u64 + 3).into(), &3.into()), "{last}");
    let after = latents();
    assert_eq!(after.len(), before.len() + 3);
    assert_eq!(before.iter().filter(|row| !after.contains(row)).count(), 0);

    // The one that is no picture is tried again, and nothing else.
    let tried = Planned { plan: format!("{}-tried", planned.plan), ..Planned::new(&days, "again", "") };
    let last = tried.run(&["--retry-rejected"], 2, &mut random);
    assert_eq!((&last["rows_embedded"], &last["rejects"]["unknown_format"]), (&1.into(), &1.into()), "{last}");
    assert_eq!(latents(), after);
}

#[test]
fn what_comes_too_early_or_too_late_is_told_with_the_code_for_it() {
    let days = Days::new(s3(), "tasks-order");
    let planned = Planned::new(&days, "early", "");
    let ran = planned.task(&["embed"], 0, 1).expect(2);
    assert!(
        ran.stderr.contains("plan.json") && ran.stderr.contains("lookalike plan PIPELINE --plan"),
        "{}",
        ran.stderr
    );
    planned.plan(&["--from", DAYS[0], "--to", DAYS[2]]).expect(0);
    // Before anything is embedded, and when half is.
    let ran = planned.commit("embed").expect(5);
    assert!(ran.stderr.contains("embedding ds=2026-11-01 is not complete: 3 missing"), "{}", ran.stderr);
    planned.task(&["embed"], 1, 2).expect(0);
    planned.commit("embed").expect(5);
    let ran = planned.task(&["flag"], 0, 1).expect(5);
    assert!(ran.stderr.contains("commit --stage neighbors"), "{}", ran.stderr);
    planned.task(&["embed"], 0, 2).expect(0);
    planned.commit("embed").expect(0);
    let ran = planned.task(&["neighbors", "--step", "join"], 0, 1).expect(5);
    assert!(ran.stderr.contains("commit --stage sort"), "{}", ran.stderr);
    planned.commit("sort").expect(0);
    let ran = planned.commit("neighbors").expect(5);
    assert!(ran.stderr.contains("searching the neighbors of ds=2026-11-01 is not complete"), "{}", ran.stderr);

    // A run that comes between publishes more latents: the plan is of no use any more, and says so for good.
    planned.task(&["neighbors", "--step", "join"], 0, 1).expect(0);
    days.run("early", &[]).expect(0);
    let ran = planned.commit("neighbors").expect(4);
    assert!(
        ran.stderr.contains("has changed since the plan was made") && ran.stderr.contains("new plan"),
        "{}",
        ran.stderr
    );

    // Another plan does not take its place, and one of the same does.
    let ran = planned.plan(&[]).expect(2);
    assert!(ran.stderr.contains("another plan"), "{}", ran.stderr);
    planned.plan(&["--from", DAYS[0], "--to", DAYS[2]]).expect(0);

    // A source that changes under the plan is not embedded as if it were the one that was planned.
    let changing = Planned::new(&days, "changing", "");
    changing.plan(&[]).expect(0);
    days.put_source("images", 500);
    let ran = changing.task(&["embed"], 0, 3).expect(4);
    assert!(ran.stderr.contains("ds=2026-11-01 of") && ran.stderr.contains("has changed"), "{}", ran.stderr);
    let written = days.bucket.list(&format!("{}/changing", days.prefix));
    assert!(written.iter().all(|name| !name.ends_with(".parquet")), "{written:?}");
}

#[test]
fn a_plan_of_nothing_and_a_pipeline_of_one_stage_go_through_all_steps() {
    let days = Days::new(s3(), "tasks-little");
    let nothing = Planned::new(&days, "nothing", "");
    let planned = nothing.plan(&["--from", "2027-01-01"]).expect(0).summary();
    assert_eq!((&planned["status"], &planned["tasks"]["embed"]), (&"nothing_to_do".into(), &0.into()));
    let little = Planned::new(&days, "little", "");
    let text = days.pipeline("images", "little").replace("[neighbors]\n", "[neighbors]\nenabled = false\n");
    let text = text.replace("[anomaly]\n", "[anomaly]\nenabled = false\n");
    let text = without_lines(&text, &["k = ", "duplicate_distance", "reference", "threshold"]);
    write(&days.folder().join(&little.pipeline), &text);
    let device = format!("{text}\n").replace("[execution]\n", "[execution]\ndevice = \"auto\"\n");
    write(&days.folder().join("auto.toml"), &device);
    let auto = ["plan", "auto.toml", "--plan", "plans/auto"];
    let ran = days.bucket.lookalike(days.folder(), &auto).expect(2);
    assert!(ran.stderr.contains("device = \"auto\""), "{}", ran.stderr);
    little.plan(&[]).expect(0);
    for planned in [&nothing, &little] {
        for (steps, stage) in STAGES {
            for step in steps {
                planned.task(step, 0, 1).expect(0);
            }
            planned.commit(stage).expect(0);
        }
    }
    let copy = days.download("little");
    assert_eq!(rows(&copy, TableName::Latents, &[]).len(), ROWS);
    let runs = rows(&copy, TableName::Runs, &[]);
    assert_eq!(runs.len(), DAYS.len());
    assert!(runs[0].contains("onnxruntime_version=1."), "{}", runs[0]);
    assert!(days.bucket.list(&format!("{}/nothing", days.prefix)).is_empty());
}

#[test]
fn the_engine_says_which_task_this_is() {
    let days = Days::new(s3(), "tasks-engine");
    let planned = Planned::new(&days, "engine", "");
    planned.plan(&["--partition", "ds=2026-11-01"]).expect(0);
    let embed = |variables: &[(&str, &str)], args: &[&str]| -> Ran {
        let mut command = days.bucket.command(days.folder(), &[&["embed", "--plan", &planned.plan], args].concat());
        command.envs(variables.iter().copied()).output().unwrap().into()
    };
    let ran = embed(&[("JOB_COMPLETION_INDEX", "1")], &["--task-count", "3"]).expect(0);
    assert!(ran.stderr.contains("embed: task 1 of 3 (JOB_COMPLETION_INDEX)"), "{}", ran.stderr);
    assert_eq!((&ran.summary()["task_index"], &ran.summary()["units"]), (&1.into(), &1.into()));
    let ran =
        embed(&[("SLURM_ARRAY_TASK_ID", "3"), ("SLURM_ARRAY_TASK_COUNT", "3"), ("SLURM_ARRAY_TASK_MIN", "1")], &[]);
    assert_eq!(ran.expect(0).summary()["task_index"], 2);
    embed(&[("JOB_COMPLETION_INDEX", "3")], &["--task-count", "3"]).expect(2);
    embed(&[], &["--task-index", "0", "--task-count", "3"]).expect(0);
    planned.commit("embed").expect(0);
}
