// Why a node of this pack was refused or failed is written on it: ComfyUI's own front ends show it in a
// dialog, or behind a button of one. What a node said before is taken off when it runs anew.
import { app } from "../../../scripts/app.js"
import { api } from "../../../scripts/api.js"
import { forget, hide, isOurs, show } from "./text_on_nodes.js"

const REFUSED = "custom_validation_failed"
let faulty = []

/** The node of this pack that an execution id such as "3" or, in a subgraph, "7:3" stands for. */
function ours(id) {
  let node
  let graph = app.rootGraph ?? app.graph
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part))
    graph = node?.subgraph
  }
  return isOurs(node) ? node : undefined
}

/** An input's name as the node shows it. */
function shown(node, name) {
  const widget = node.widgets?.find((each) => each.name === name)
  const input = node.inputs?.find((each) => each.name === name)
  return widget?.label ?? input?.localized_name ?? input?.label ?? name
}

function reason(node, { type, message, details, extra_info }) {
  const name = extra_info?.input_name
  if (type !== REFUSED) return name ? `${message}: ${shown(node, name)}` : `${message} ${details ?? ""}`
  return details.startsWith(`${name} - `) ? details.slice(name.length + 3) : details
}

function write(id, text) {
  const node = ours(id)
  if (!node) return
  forget(node)
  show(node, text.trim(), { wrong: true })
  faulty.push(node)
}

function explain(refused) {
  for (const [id, { errors }] of Object.entries(refused ?? {})) {
    const node = ours(id)
    if (node && errors.length) write(id, [...new Set(errors.map((each) => reason(node, each)))].join("\n"))
  }
}

const queuePrompt = api.queuePrompt
// No event tells of a graph that was refused.
api.queuePrompt = async function () {
  faulty.forEach(hide)
  faulty = []
  try {
    const answer = await queuePrompt.apply(this, arguments)
    explain(answer?.node_errors)
    return answer
  } catch (error) {
    explain(error?.response?.node_errors)
    throw error
  }
}

api.addEventListener("executing", ({ detail }) => {
  const node = detail === null ? undefined : ours(detail)
  if (node) hide(node)
})
api.addEventListener("execution_error", ({ detail }) => write(detail.node_id, detail.exception_message ?? ""))
