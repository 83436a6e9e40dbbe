//! `docs/kv_plan.schema.json` accepts what the library reads, and nothing else.

use boon::{Compiler, Schemas};
use fusedkv::KvPlan;
use serde_json::{Value, json};

use crate::models::plans;

/// What is left when one part of a JSON value is taken out, doubled under another name, or replaced.
fn spoilt(value: &Value) -> Vec<Value> {
    let mut all = vec![json!(null), json!(7), json!("own"), json!({})];
    match value {
        Value::Object(map) => {
            for key in map.keys() {
                let mut without = map.clone();
                without.remove(key);
                all.push(Value::Object(without));
                for part in spoilt(&map[key]) {
                    let mut replaced = map.clone();
                    replaced.insert(key.clone(), part);
                    all.push(Value::Object(replaced));
                }
            }
            let mut more = map.clone();
            more.insert("another".to_owned(), json!(1));
            all.push(Value::Object(more));
        }
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                for part in spoilt(item) {
                    let mut replaced = items.clone();
                    replaced[i] = part;
                    all.push(Value::Array(replaced));
                }
            }
        }
        Value::Number(_) => all.extend([json!(-1), json!(0.5)]),
        _ => {}
    }
    all
}

#[test]
fn the_schema_is_what_plans_are_read_by() {
    let schema: Value =
        serde_json::from_str(include_str!("../../docs/kv_plan.schema.json")).unwrap();
    let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
    compiler.add_resource("kv_plan.json", schema).unwrap();
    let schema = compiler.compile("kv_plan.json", &mut schemas).unwrap();
    let (mut read, mut refused) = (0, 0);
    for plan in plans(4) {
        let json = serde_json::to_value(&plan).unwrap();
        for value in spoilt(&json).into_iter().chain([json]) {
            let is_read = serde_json::from_value::<KvPlan>(value.clone());
            let is_valid = schemas.validate(&value, schema);
            assert_eq!(
                is_read.is_ok(),
                is_valid.is_ok(),
                "{value} {is_read:?} {is_valid:?}"
            );
            *if is_read.is_ok() {
                &mut read
            } else {
                &mut refused
            } += 1;
        }
    }
    assert!(read > 30 && refused > 300, "{read} {refused}");
}
