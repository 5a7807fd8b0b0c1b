package build

import (
	"context"
	"encoding/json"
	"strings"
	"sync"
	"time"

	"conex/internal/dockerfile"
	"conex/internal/ocispec"
)

// Kinds of nodes.
const (
	kindImage   = "image"   // a base image
	kindScratch = "scratch" // nothing
	kindContext = "context" // selected files of the context
	kindURL     = "url"     // what ADD downloads
	kindGit     = "git"     // a commit that ADD takes
	kindCopy    = "copy"    // COPY and ADD
	kindRun     = "run"     // RUN
	kindMkdir   = "mkdir"   // WORKDIR
)

// result is what a node gives: a file system, as layers from the base up, and how its own part came to be.
type result struct {
	layers  []ocispec.Digest
	added   bool // the last of layers is the node's own
	created time.Time
	// loose says that it is not what the definition gives: a context that changed while it was read, or a step that a person went on with by
	// hand. What stands on it is not recorded by its definition.
	loose bool
}

// key is a result's part in content keys.
func (r result) key() string {
	s := make([]string, len(r.layers))
	for i, d := range r.layers {
		s[i] = string(d)
	}
	return strings.Join(s, ",")
}

// node is one piece of work in the graph: an op and the nodes that it needs. The first input of a step is the file system that it
// changes. Nodes are made by the planner and never changed afterwards, but for what is computed once.
type node struct {
	kind   string
	op     any
	inputs []*node
	step   dockerfile.Step
	title  string // "RUN npm ci"
	vertex *vertex
	// number is the step's in its stage, config what commands there run with, source what an image or leaf is: for the history.
	number int
	config *StepConfig
	source InputRecord

	// fixed is the result of a node that needs no work: an image, scratch.
	fixed *result
	// prepare computes what a context or url node is keyed by.
	prepare func(ctx context.Context) (string, error)
	// owner is the step that a context or url node belongs to.
	owner *node
	// run does the work; in are the results of inputs.
	run func(ctx context.Context, n *node, in []result) (made, error)
	// again, when it says true after run, keeps the result out of the cache: an input changed meanwhile.
	again func() bool
	// selects is set for a COPY --from: its content key has what the copy selects instead of all that the second input holds.
	selects selector
	// free says that the result does not depend on the first input, the file system below, as with COPY --link.
	free bool
	// noCache runs the step though its result is known; fresh says that it or a step that it depends on is such: then its definition
	// tells nothing, though what its inputs turn out to hold may.
	noCache, fresh bool

	keyOnce sync.Once
	defKey  string
	opJSON  []byte
	keyErr  error
	value   string // what prepare returned

	// copies is a COPY's or ADD's work.
	copies *copier
	// args are the build arguments that variables of the step may come from; unstable says that again was true.
	args     []string
	unstable bool

	// selected is what selects returned; unneeded says that the build did without.
	selected string
	unneeded bool
	// solved says that the result is known, imported from which cache it came in this build.
	solved   bool
	imported string

	solveOnce sync.Once
	res       result
	resErr    error
}

// made is what running a node gives: the layer, "" when nothing changed, and its time.
type made struct {
	layer ocispec.Digest
	when  time.Time
	// waited is how long it waited for other steps to make room.
	waited time.Duration
}

// selector hashes the files that a COPY takes out of a stage or an image. The methods are called by one goroutine.
type selector interface {
	// before hashes them in the tree that the layers show.
	before(ctx context.Context, from result) (string, error)
	// after is the same of the files that run has just copied; ok is false if it did not.
	after() (sum string, ok bool)
	// release frees what before has opened and run did not use.
	release() error
}

// keyError says whose input could not be read; the key of every later step fails with it too.
type keyError struct {
	owner *node
	err   error
}

func (e *keyError) Error() string { return e.err.Error() }
func (e *keyError) Unwrap() error { return e.err }

// isLeaf reports whether a node stands for data that only its key says, not for a file system.
func (n *node) isLeaf() bool { return n.prepare != nil }

// key computes the definition key, and with it those of all inputs, side by side.
func (n *node) key(ctx context.Context) (string, error) {
	n.keyOnce.Do(func() {
		if n.prepare != nil {
			sum, err := n.prepare(ctx)
			if err != nil {
				n.keyErr = &keyError{n.owner, err}
				return
			}
			n.value = sum
			n.defKey = keyOf(byDefinition, n.kind, []byte(sum), nil)
			return
		}
		if n.opJSON, n.keyErr = json.Marshal(n.op); n.keyErr != nil {
			return
		}
		keys, err := n.inputKeys(ctx)
		if err != nil {
			n.keyErr = err
			return
		}
		n.defKey = keyOf(byDefinition, n.kind, n.opJSON, keys)
	})
	return n.defKey, n.keyErr
}

// inputKeys are the definition keys of what n depends on.
func (n *node) inputKeys(ctx context.Context) ([]string, error) {
	inputs := n.depends()
	keys := make([]string, len(inputs))
	errs := make([]error, len(inputs))
	var wg sync.WaitGroup
	for i, in := range inputs {
		if i == len(inputs)-1 { // the last, which is the only one as a rule, on this goroutine
			keys[i], errs[i] = in.key(ctx)
			break
		}
		wg.Go(func() { keys[i], errs[i] = in.key(ctx) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return nil, err
		}
	}
	return keys, nil
}

// depends are the inputs that the result depends on.
func (n *node) depends() []*node {
	if n.free {
		return n.inputs[1:]
	}
	return n.inputs
}

// contentKey is the key by what the inputs hold, whatever way they came to it. sum stands for what the selector says, if there is one.
func (n *node) contentKey(ctx context.Context, in []result, sum string) (key string, ingredients []string, err error) {
	for i, input := range n.inputs {
		switch {
		case i == 0 && n.free:
		case i == 1 && n.selects != nil:
			ingredients = append(ingredients, sum)
		case !input.isLeaf():
			ingredients = append(ingredients, in[i].key())
		default:
			k, err := input.key(ctx)
			if err != nil {
				return "", nil, err
			}
			ingredients = append(ingredients, k)
		}
	}
	return keyOf(byContent, n.kind, n.opJSON, ingredients), ingredients, nil
}
