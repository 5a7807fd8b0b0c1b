package build

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"conex/internal/dockerfile"
	"conex/internal/ocispec"

	"golang.org/x/sync/errgroup"
)

// solver computes nodes: from the cache where it can, otherwise by running them, each once, independent ones side by side.
type solver struct {
	cache  *cache
	file   *dockerfile.File
	gates  *gates
	cancel context.CancelFunc
	// imports are caches that are elsewhere; nil without any.
	imports *importer
	flights
	// build is this build's id in the history, of which why knows the earlier ones.
	build string
	began time.Time
	why   *explainer

	mu    sync.Mutex
	first error // the first failure, which cancelled the rest
	made  []ocispec.Digest
	ran   int // how many steps did work
}

func newSolver(c *cache, f *dockerfile.File, g *gates, cancel context.CancelFunc) *solver {
	return &solver{cache: c, file: f, gates: g, cancel: cancel}
}

// solve returns a node's result. Whoever asks second waits for the first.
func (s *solver) solve(ctx context.Context, n *node) (result, error) {
	n.solveOnce.Do(func() {
		n.res, n.resErr = s.compute(ctx, n)
		n.resErr = s.settle(n, n.resErr)
		n.solved = n.resErr == nil
	})
	return n.res, n.resErr
}

// settle ends the node's vertex and, on the first failure, everything else.
func (s *solver) settle(n *node, err error) error {
	if err == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.first != nil { // an input's failure passing through, or a step that was cancelled because of it
		if n.vertex != nil {
			n.vertex.end(Canceled, "", nil)
		}
		return s.first
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		if n.vertex != nil {
			n.vertex.end(Canceled, "", nil)
		}
		s.first = err
		return err
	}
	var ke *keyError
	if errors.As(err, &ke) {
		n, err = ke.owner, ke.err
	}
	if n.step.Instruction != nil {
		err = stepError(s.file, n.step, n.title, err)
	}
	s.first = err
	if n.vertex != nil {
		n.vertex.end(Failed, "", err)
	}
	s.cancel()
	return err
}

func (s *solver) compute(ctx context.Context, n *node) (_ result, err error) {
	if n.fixed != nil {
		if _, err := n.key(ctx); err != nil {
			return result{}, err
		}
		if n.vertex != nil {
			if n.kind == kindImage {
				n.vertex.origin = &Origin{Kind: OriginImage, From: n.source.Value}
			}
			n.vertex.end(Cached, "", nil)
		}
		return *n.fixed, nil
	}
	// The base is needed in any case, for its layers; it must not wait for a context to be hashed.
	in := make([]result, len(n.inputs))
	base := make(chan error, 1)
	go func() { // ends with the base; received from below on every path
		var err error
		in[0], err = s.solve(ctx, n.inputs[0])
		base <- err
	}()
	rec, hit, err := s.lookup(ctx, n)
	if err == nil && !hit {
		err = s.others(ctx, n, in) // beside the base: stages that a chain of COPY --from needs run at the same time
	}
	if err != nil {
		err = s.settle(n, err) // now, not when the base is done: a missing file is no reason to wait for what runs before
	}
	if berr := <-base; err == nil {
		err = berr
	}
	if err == nil && hit && in[0].loose {
		hit, err = false, s.others(ctx, n, in) // what is known of the step stands on another base
	}
	if err != nil {
		return result{}, err
	}
	if hit {
		return s.cached(n, in[0], rec, OriginDefinition), nil
	}
	loose := slices.ContainsFunc(in, func(r result) bool { return r.loose })
	// This build or another process may be at the same step: its result serves us too.
	fl, mine, err := s.join(ctx, n.defKey)
	if err != nil {
		return result{}, err
	}
	if !mine {
		return s.cached(n, in[0], fl.rec, OriginConcurrent), nil
	}
	defer func() { s.land(n.defKey, fl) }()
	release, err := s.cache.lock(ctx, n.defKey, func() {
		n.vertex.start()
		n.vertex.output("waiting for another build, which is at this step\n", true)
	})
	if err != nil {
		return result{}, err
	}
	defer release()
	if rec, hit, err = s.lookup(ctx, n); err != nil {
		return result{}, err
	}
	if hit && !loose {
		fl.rec, fl.ok = rec, true
		return s.cached(n, in[0], rec, OriginDefinition), nil
	}
	if n.selects != nil {
		defer func() { err = errors.Join(err, n.selects.release()) }()
	}
	known, err := s.known(ctx, n, in)
	if err != nil {
		return result{}, err
	}
	rec, hit = known.rec, known.hit
	if !hit {
		n.vertex.explain(s.why.reasons(n))
		if rec, err = s.execute(ctx, n, in); err != nil {
			return result{}, err
		}
		if n.again != nil && n.again() {
			n.unstable = n.kind != kindRun
			r := s.finished(n, in[0], rec)
			r.loose = true
			return r, nil
		}
		if err := s.remember(ctx, n, in, known, rec); err != nil {
			return result{}, err
		}
	}
	rec.Key = n.defKey
	if rec.Inputs, err = n.inputKeys(ctx); err != nil {
		return result{}, err
	}
	rec.Op, rec.Title, rec.Files = n.opJSON, n.title, n.selected
	if !loose {
		if err := s.cache.put(byDefinition, rec); err != nil {
			return result{}, err
		}
	}
	fl.rec, fl.ok = rec, true
	var r result
	if hit {
		r = s.cached(n, in[0], rec, OriginContent)
	} else {
		r = s.finished(n, in[0], rec)
	}
	r.loose = loose
	return r, nil
}

// content is what the cache knows of a node by what its inputs hold.
type content struct {
	key         string // "" when the selection was not hashed
	ingredients []string
	rec         Record
	hit         bool
}

// known asks the cache for the node's content. What a COPY selects is hashed only if the same copy was made before: when nothing can
// be found, reading the files twice is too dear.
func (s *solver) known(ctx context.Context, n *node, in []result) (c content, err error) {
	sum := ""
	if n.selects != nil {
		_, seen, err := s.cache.get(byContent, n.seenKey(in))
		seen = seen || s.imports.has(ctx, byContent, n.seenKey(in))
		if err != nil || !seen || n.noCache {
			return c, err
		}
		if sum, err = n.selects.before(ctx, in[1]); err != nil {
			return c, err
		}
		n.selected = sum
	}
	if c.key, c.ingredients, err = n.contentKey(ctx, in, sum); err != nil || n.noCache {
		return c, err
	}
	c.rec, c.hit, err = s.find(ctx, byContent, c.key, n)
	return c, err
}

// seenKey is the key of a record that says: a selection was copied by this node's op before.
func (n *node) seenKey(in []result) string {
	var base []string
	if !n.free {
		base = []string{in[0].key()}
	}
	return keyOf(byContent, n.kind+" seen", n.opJSON, base)
}

// remember records a result by its content.
func (s *solver) remember(ctx context.Context, n *node, in []result, c content, rec Record) (err error) {
	if n.selects != nil {
		if err := s.cache.put(byContent, Record{Key: n.seenKey(in), Kind: n.kind, Layer: rec.Layer, Created: rec.Created, Made: rec.Made}); err != nil {
			return err
		}
		if c.key == "" {
			sum, ok := n.selects.after()
			if !ok {
				return nil
			}
			if c.key, c.ingredients, err = n.contentKey(ctx, in, sum); err != nil {
				return err
			}
			n.selected = sum
		}
	}
	rec.Key, rec.Inputs = c.key, c.ingredients
	return s.cache.put(byContent, rec)
}

// lookup asks the cache for the node's definition.
func (s *solver) lookup(ctx context.Context, n *node) (Record, bool, error) {
	key, err := n.key(ctx)
	if err != nil || n.fresh {
		return Record{}, false, err
	}
	return s.find(ctx, byDefinition, key, n)
}

// others solves the inputs besides the base.
func (s *solver) others(ctx context.Context, n *node, in []result) error {
	g, ctx := errgroup.WithContext(ctx)
	for i, input := range n.inputs[1:] {
		if input.isLeaf() {
			continue
		}
		g.Go(func() error {
			var err error
			in[i+1], err = s.solve(ctx, input)
			return err
		})
	}
	return g.Wait()
}

func (s *solver) execute(ctx context.Context, n *node, in []result) (Record, error) {
	if n.kind != kindRun { // which passes its gates by itself
		leave, err := s.gates.work.enter(ctx)
		if err != nil {
			return Record{}, err
		}
		defer leave()
	}
	n.vertex.start()
	begun := time.Now()
	m, err := n.run(ctx, n, in)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return Record{}, err
	}
	s.mu.Lock()
	s.ran++
	if m.layer != "" {
		s.made = append(s.made, m.layer)
	}
	s.mu.Unlock()
	return Record{
		Kind: n.kind, Title: n.title, Op: n.opJSON, Layer: m.layer, Created: m.when.UTC(), Took: time.Since(begun) - m.waited,
		Build: s.build, Made: time.Now().UTC(),
	}, nil
}

func (s *solver) cached(n *node, base result, rec Record, how string) result {
	n.vertex.origin = s.origin(how, rec)
	text := ""
	if n.imported != "" {
		text = "imported from " + n.imported
	}
	n.vertex.end(Cached, text, nil)
	return onto(base, rec)
}

func (s *solver) finished(n *node, base result, rec Record) result {
	n.vertex.end(Done, "", nil)
	return onto(base, rec)
}

// onto is what a step gives: the layers below and its own.
func onto(base result, rec Record) result {
	r := result{layers: base.layers, created: rec.Created, loose: base.loose}
	if rec.Layer != "" {
		r.layers = append(append([]ocispec.Digest(nil), base.layers...), rec.Layer)
		r.added = true
	}
	return r
}
