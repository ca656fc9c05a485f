// Workflow templates are listed as the file system has them, which is by chance on Linux; ours are numbered.
import { api } from "../../../scripts/api.js"
import { FOLDER } from "./text_on_nodes.js"

const getWorkflowTemplates = api.getWorkflowTemplates
api.getWorkflowTemplates = async function () {
  const found = await getWorkflowTemplates.apply(this, arguments)
  found?.[FOLDER]?.sort()
  return found
}
