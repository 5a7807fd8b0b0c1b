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
	kindCopy    = "copy"    // COPY and ADD
	kindRun     = "run"     // RUN
	kindMkdir   = "mkdir"   // WORKDIR
	kindConfig  = "config"  // the finished image's config; only to remember when it was made first
)

// result is what a node gives: a file system, as layers from the base up, and how its own part came to be.
type result struct {
	layers  []ocispec.Digest
	added   bool // the last of layers is the node's own
	created time.Time
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

	// fixed is the result of a node that needs no work: an image, scratch.
	fixed *result
	// prepare computes what a context or url node is keyed by.
	prepare func(ctx context.Context) (string, error)
	// owner is the step that a context or url node belongs to.
	owner *node
	// run does the work; in are the results of inputs. It returns the layer that it made, "" when nothing changed.
	run func(ctx context.Context, n *node, in []result) (ocispec.Digest, error)
	// again, when it says true after run, keeps the result out of the cache: an input changed meanwhile.
	again func() bool

	keyOnce sync.Once
	defKey  string
	opJSON  []byte
	keyErr  error

	solveOnce sync.Once
	res       result
	resErr    error
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

func (n *node) inputKeys(ctx context.Context) ([]string, error) {
	keys := make([]string, len(n.inputs))
	errs := make([]error, len(n.inputs))
	var wg sync.WaitGroup
	for i, in := range n.inputs {
		if i == len(n.inputs)-1 { // the last, which is the only one as a rule, on this goroutine
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

// contentKey is the key by what the inputs hold, whatever way they came to it.
func (n *node) contentKey(ctx context.Context, in []result) (key string, ingredients []string, err error) {
	for i, input := range n.inputs {
		if !input.isLeaf() {
			ingredients = append(ingredients, in[i].key())
			continue
		}
		k, err := input.key(ctx)
		if err != nil {
			return "", nil, err
		}
		ingredients = append(ingredients, k)
	}
	return keyOf(byContent, n.kind, n.opJSON, ingredients), ingredients, nil
}
