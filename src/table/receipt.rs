//! Receipts: the proof that a unit of work is done, written once and never changed.
//!
//! A task writes its data file first and then, with put-if-absent, a small JSON object that names it. Whoever comes second (a
//! retry, another machine) finds the receipt and uses the file it names; its own file is never committed. What a run has done is
//! the set of its receipts, so a resumed run does the units without.

use std::collections::BTreeMap;

use futures::{StreamExt as _, TryStreamExt as _};
use object_store::ObjectMeta;
use serde::{Deserialize, Serialize};

use super::{DataFile, Table, TableError};
use crate::schema::TableName;
use crate::store::{PutOutcome, Store, StoreError};

/// Folder of all receipts, below the output prefix.
const FOLDER: &str = "_lookalike/receipts";

/// Receipts read at a time.
const READS_IN_FLIGHT: usize = 32;

/// What a unit came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// Number of the unit within its partition.
    pub unit: usize,
    /// The file that holds its rows.
    pub file: DataFile,
    /// Rows that were read for it.
    pub num_read: u64,
    /// Rows by status: `ok`, and the codes of rejects.
    pub rows_by_status: BTreeMap<String, u64>,
}

impl Receipt {
    /// Reads the JSON of a receipt.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }
}

/// The receipts of one run in one table.
#[derive(Debug, Clone)]
pub struct Receipts {
    store: Store,
    folder: String,
}

impl Receipts {
    /// The receipts of run `run_id` below the output prefix.
    pub fn new(output: &Store, table: TableName, run_id: &str) -> Self {
        Self { store: output.clone(), folder: format!("{FOLDER}/{}/{run_id}", table.name()) }
    }

    /// The receipts of all runs below the output prefix.
    pub async fn all(output: &Store) -> Result<Vec<ObjectMeta>, StoreError> {
        output.list(FOLDER).await
    }

    /// All receipts there are, by unit.
    pub async fn read(&self) -> Result<BTreeMap<usize, Receipt>, TableError> {
        let objects = self.store.list(&self.folder).await?;
        let receipts: Vec<Receipt> = futures::stream::iter(objects)
            .map(async |object| self.read_one(&self.store.relative(&object.location)).await)
            .buffered(READS_IN_FLIGHT)
            .try_collect()
            .await?;
        Ok(receipts.into_iter().map(|receipt| (receipt.unit, receipt)).collect())
    }

    /// The receipt of one unit of a table, if it is there and [stands](Self::stands).
    pub async fn find(&self, table: &Table, unit: usize) -> Result<Option<Receipt>, TableError> {
        match self.read_one(&self.name(unit)).await {
            Ok(receipt) => Ok(self.stands(table, &receipt).await?.then_some(receipt)),
            Err(TableError::Store(error)) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the file that a receipt names is there, in its table. A receipt whose file is gone is taken back, so that the unit is done
    /// again.
    pub async fn stands(&self, table: &Table, receipt: &Receipt) -> Result<bool, TableError> {
        if table.is_there(&receipt.file).await? {
            return Ok(true);
        }
        self.store.delete(&self.name(receipt.unit)).await?;
        Ok(false)
    }

    fn name(&self, unit: usize) -> String {
        format!("{}/{unit:05}.json", self.folder)
    }

    /// Hands in a receipt; returns the one that counts, which is an earlier one if there is one.
    pub async fn hand_in(&self, receipt: Receipt) -> Result<Receipt, TableError> {
        let name = self.name(receipt.unit);
        let text = serde_json::to_vec(&receipt)
            .map_err(|source| TableError::Receipt { url: self.store.url_of(&name), source })?;
        match self.store.put_if_absent(&name, text.into()).await? {
            PutOutcome::Created => Ok(receipt),
            PutOutcome::AlreadyThere => self.read_one(&name).await,
        }
    }

    async fn read_one(&self, name: &str) -> Result<Receipt, TableError> {
        let text = self.store.get(name).await?;
        Receipt::parse(&text).map_err(|source| TableError::Receipt { url: self.store.url_of(name), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Stores;
    use url::Url;

    fn receipt(name: &str) -> Receipt {
        let file = DataFile { path: name.to_owned(), size_bytes: 1, modified_ms: 2, num_rows: 3 };
        Receipt { unit: 7, file, num_read: 3, rows_by_status: BTreeMap::from([("ok".to_owned(), 3)]) }
    }

    #[tokio::test]
    async fn the_first_receipt_counts_and_the_second_attempt_learns_of_it() {
        let store = Stores::default().open(&Url::parse("memory:///out").unwrap()).unwrap();
        let receipts = Receipts::new(&store, TableName::Latents, "abc");
        assert_eq!(receipts.hand_in(receipt("first")).await.unwrap(), receipt("first"));
        assert_eq!(receipts.hand_in(receipt("second")).await.unwrap(), receipt("first"));
        assert_eq!(receipts.read().await.unwrap(), BTreeMap::from([(7, receipt("first"))]));
        let other_run = Receipts::new(&store, TableName::Latents, "abd");
        assert!(other_run.read().await.unwrap().is_empty());
    }
}
