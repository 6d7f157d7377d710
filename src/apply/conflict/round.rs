//! Round trips of a transaction under way, and what an error of one is about.

use super::Settler;
use super::greatest::Place;
use super::judge::{Local, Op};
use super::look::LastWriter;
use super::settle::{Candidate, Frame, bytes};
use crate::apply::Applier;
use crate::apply::error::{Error, Result, advice, said};
use crate::apply::request::{Request, Role};
use crate::apply::rows::culprit;
use crate::change::{Change, OldRow};
use crate::fault::{Fault, Faulty};
use crate::pg::{self, Reply};

/// What came back: rows and tag of each statement.
pub(super) struct Answers {
    pub rows: Vec<Vec<pg::Row>>,
    pub tags: Vec<String>,
}

impl Applier {
    /// Locks the rows of a group in order, behind what `request` has to write before, and tells who
    /// wrote each last.
    pub(super) async fn look(
        &mut self,
        settler: &mut Settler,
        frame: &Frame<'_>,
        mut request: Request,
        group: &[Candidate<'_>],
    ) -> Result<Vec<Local>> {
        let first = request.roles.len();
        for candidate in group {
            let plan = settler.plan(&candidate.relation)?;
            let away = candidate.op == Op::Delete
                || matches!(candidate.change, Change::Update { old: Some(OldRow::Key(_)), .. });
            let look = if away { &plan.look_away } else { &plan.look };
            request.pipeline.run(look, bytes(&candidate.key));
            request.roles.push(Role::Aside);
        }
        let answers = self.ask(frame, request).await?;
        let mut missing = Request::default();
        let mut found = Vec::new();
        for (n, candidate) in group.iter().enumerate() {
            let row = answers.rows.get(first + n).and_then(|rows| rows.first());
            let last = row.map(|row| LastWriter::read(row, 0)).transpose()?;
            if last.is_none() {
                let gone = &settler.plan(&candidate.relation)?.gone;
                missing.pipeline.run(gone, bytes(&candidate.key));
                missing.roles.push(Role::Aside);
            }
            found.push(last);
        }
        let mut gone = Vec::new();
        if !missing.roles.is_empty() {
            gone = self.ask(frame, missing).await?.rows;
        }
        let (mut gone, mut locals) = (gone.into_iter(), Vec::new());
        let commit_time = frame.commit_time;
        for last in found {
            locals.push(match last {
                Some(last) => Local::Row(settler.rival(last, commit_time).await?),
                None => match gone.next().and_then(|rows| rows.into_iter().next()) {
                    None => Local::Missing,
                    Some(row) => {
                        let last = LastWriter::read(&row, 0)?;
                        Local::Gone(settler.rival(last, commit_time).await?)
                    }
                },
            });
        }
        for (candidate, local) in group.iter().zip(&mut locals) {
            self.weigh(settler, candidate, local).await?;
        }
        Ok(locals)
    }

    /// Where a column decides: which of the two has the greater value. A deletion has none, nor has
    /// a change of the key, which is one under the old key.
    async fn weigh(
        &mut self,
        settler: &mut Settler,
        candidate: &Candidate<'_>,
        local: &mut Local,
    ) -> Result<()> {
        let (Local::Row(Some(rival)) | Local::Gone(Some(rival))) = local else { return Ok(()) };
        if candidate.incoming.rule.is_some() || candidate.op == Op::Delete {
            return Ok(());
        }
        let relation = &candidate.relation;
        if settler.plan(relation)?.keys(candidate.change).1.is_some() {
            return Ok(());
        }
        let table = self.mapping(relation)?.table.name.quoted();
        let value = settler.value_of(relation, candidate.change)?;
        let weighed = (value, Place::Key(&candidate.key));
        let (session, incoming) = (&mut self.session, &candidate.incoming);
        rival.outweighed =
            settler.outweighs(session, (relation, &table), weighed, incoming).await?;
        Ok(())
    }

    /// Where a change that lost gives its row another key: the row comes to that key all the same,
    /// as the other side has it there, and what won is under the old one. True if it is written.
    pub(super) async fn arrive(
        &mut self,
        settler: &mut Settler,
        frame: &Frame<'_>,
        lost: &Candidate<'_>,
        request: &mut Request,
    ) -> Result<bool> {
        let (relation, incoming) = (lost.relation.clone(), lost.incoming);
        let (_, moved) = settler.plan(&relation)?.keys(lost.change);
        let (Some(key), Change::Update { new, .. }) = (moved, lost.change) else {
            return Ok(false);
        };
        let Some(new) = settler.filled(&relation, new).await? else { return Ok(false) };
        let change = Change::Insert { relation: relation.clone(), new };
        let (at, op) = (lost.at, Op::Insert);
        let arrival = Candidate { at, change: &change, relation, key, op, incoming };
        let alone = std::slice::from_ref(&arrival);
        let locals = self.look(settler, frame, Request::default(), alone).await?;
        let local = locals.first().copied().unwrap_or(Local::Missing);
        let decided = self.decide(settler, frame, &arrival, local).await?;
        self.put(settler, frame, &arrival, &decided, request)?;
        Ok(decided.change.is_some())
    }

    /// One round trip.
    pub(super) async fn ask(&mut self, frame: &Frame<'_>, request: Request) -> Result<Answers> {
        let mut answers = Answers { rows: vec![Vec::new()], tags: Vec::new() };
        if request.roles.is_empty() {
            return Ok(answers);
        }
        let outcome = self.session.exchange(request.pipeline, |reply| match reply {
            Reply::Row(row) => {
                if let Some(rows) = answers.rows.last_mut() {
                    rows.push(row);
                }
            }
            Reply::Done(tag) => {
                answers.tags.push(tag);
                answers.rows.push(Vec::new());
            }
        });
        let Err(error) = outcome.await else {
            answers.rows.pop();
            return Ok(answers);
        };
        let failed = request.roles.get(answers.tags.len()).copied();
        if error.is_closed() || error.fault() == Fault::Retry {
            return Err(error.into());
        }
        if failed == Some(Role::Progress) {
            return Err(self.progress.explain(&mut self.session, error).await);
        }
        Err(self.named(frame, failed, error))
    }

    /// The error with the row that it is about.
    fn named(&self, frame: &Frame<'_>, failed: Option<Role>, error: pg::Error) -> Error {
        let Some(server) = error.server() else { return error.into() };
        let Some(Role::Step { at, .. }) = failed else { return error.into() };
        let step = frame.admitted.steps.get(at).and_then(|step| step.of(frame.part));
        let Some((_, change)) = step else { return error.into() };
        let route = change.relations().first().and_then(|r| self.writer.routes.get(r));
        let Some(route) = route else { return error.into() };
        Error::Refused {
            culprit: Box::new(culprit(route, frame.begin, change, 0)),
            said: said(server),
            advice: advice(&server.code),
            source: Box::new(error),
        }
    }
}
