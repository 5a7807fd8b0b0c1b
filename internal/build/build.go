// Package build owns buildcache/ and turns Dockerfiles into images: stages become a graph of nodes, and a solver computes each node
// once, from the cache or by running it.
//
// Only what makes files is a node (base images, COPY, ADD, RUN, WORKDIR); the other instructions fold into the image's config. Every
// node has two keys. Its definition key hashes what it says and its inputs' definition keys; its content key hashes what it says and
// its inputs' layers. The first finds a step that is unchanged, the second one whose inputs came about differently but are the same.
//
// Files:
//
//	buildcache/def/<aa>/<key>, content/<aa>/<key>   Record: the layer of a step, and the ingredients of the key; mtime = last use
//	buildcache/lock/<key>                           flock: one process executes a step
//	buildcache/stat/<hash>                          statCache of one context folder
//	buildcache/files/<aa>/<fingerprint>             fileLists: what a selection consisted of
//	builds/                                         History
//	buildcache/mount/<hash>                         a cache mount's folder, and <hash>.lock for sharing=locked
//	<state>/build/<id>.lock                         flock: a RUN step that runs; see Settle
package build

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"conex/internal/disk"
	"conex/internal/dockerfile"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/network"
	"conex/internal/ocispec"
	box "conex/internal/runtime"
)

// Builder is what builds stand on. It may run several builds at a time.
type Builder struct {
	Root  *disk.Root
	State string
	// Layers claims what it makes: see layers.Store.Claiming.
	Layers *layers.Store
	// Runtime runs RUN steps.
	Runtime box.Runtime
	// Networks connects RUN steps to the default bridge; nil leaves them with loopback alone.
	Networks *network.Manager
	// Parallel is how many commands of RUN steps a build lets run at a time; 0 is all that are ready, as in BuildKit.
	Parallel int
	// DNS and DNSSearch replace the host's name servers and search list, as in package config.
	DNS, DNSSearch []string
	// SystemdCgroup has systemd make the cgroups of RUN steps.
	SystemdCgroup bool
	// Base finds the image that a FROM or --from names, for a platform, and gets it if it is missing, or in any case with pull. progress
	// may be called with counts of bytes.
	Base func(ctx context.Context, ref string, platform ocispec.Platform, pull bool, progress func(current, total int64)) (image.Image, error)

	// fetched says that something came from a remote and was kept.
	fetched atomic.Bool

	after sync.WaitGroup
	mu    sync.Mutex
	errs  []error
}

// Build computes an image and hands it to req.Export. The caller holds a lease that Layers claims for, and Base for what it returns. The
// same input gives the same image id, here and elsewhere, but for what RUN steps make of the clock. Steps that were done before a
// failure or cancellation stay in the cache; everything else is taken back. The error is a *StepError or *dockerfile.ParseError where a
// place in the Dockerfile is to blame.
func (b *Builder) Build(ctx context.Context, req Request) (res Result, err error) {
	defer func() { err = errors.Join(err, b.finish()) }()
	if err := Settle(ctx, b.State, b.Networks); err != nil {
		return res, err
	}
	// What killed builds left in staging goes now that nothing of them writes there any more. Two folders are read.
	if err := b.Root.Sweep(); err != nil {
		return res, err
	}
	c := &cache{root: b.Root, layers: b.Layers, discard: req.Discard}
	if err := c.clearLocks(); err != nil {
		return res, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	began := time.Now()
	j := newJournal(req.Display, newStepLog(b.Root, began))
	story := newChronicle(b.Root, &req, j, began)
	res.Ref = story.rec.ID
	defer func() {
		if herr := story.finish(res.ID, err); herr != nil { // what was built is built
			j.emit(Event{Kind: Warning, Text: herr.Error()})
		}
	}()
	in, file, err := b.load(ctx, &req, j)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, in.close()) }()
	for _, syntax := range []string{file.Syntax, given(req.BuildArgs["BUILDKIT_SYNTAX"])} {
		if !dockerfile.OwnSyntax(syntax) {
			j.emit(Event{Kind: Warning, Text: fmt.Sprintf("the front end %s is not run: the file is read as a Dockerfile", syntax)})
		}
	}
	p, err := newPlanner(b, &req, file, in, j)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	story.planner = p
	target, err := p.all(ctx)
	if cerr := p.findings(in.vertex); err == nil {
		err = cerr
	}
	if err != nil {
		return res, err
	}
	if names := p.unconsumed(); len(names) > 0 {
		j.emit(Event{Kind: Warning, Text: fmt.Sprintf("build arguments that no ARG of the Dockerfile takes: %s", strings.Join(names, ", "))})
	}
	epoch, err := p.epoch()
	if err != nil {
		return res, err
	}
	s := newSolver(c, file, p.gates, cancel)
	s.build, s.began, s.why = story.rec.ID, began, newExplainer(c, story)
	s.imports = p.imports
	out, err := s.solve(ctx, target.tip)
	for _, n := range p.nodes {
		switch {
		case n.vertex == nil || n.vertex.over():
		case err == nil:
			n.unneeded = true // a hit made it so
			n.vertex.origin = &Origin{Kind: OriginUnneeded}
			n.vertex.end(Cached, "", nil)
		default:
			n.vertex.end(Canceled, "", nil)
		}
	}
	if err = errors.Join(err, p.ended(err)); err != nil {
		return res, err
	}
	res.Cached, res.Made = s.ran == 0 && !b.fetched.Load(), s.made
	if s.ran > 0 && !req.Discard {
		p.remarkWaste(ctx, target)
	}
	x := &Export{journal: j, b: b, cache: c, imports: p.imports, steps: p.nodes, tip: target.tip, Layers: out.layers, Base: target.baseLayers(), From: target.baseImage(), Epoch: epoch}
	if x.Config, err = b.config(target, out, &req, epoch, x); err != nil {
		return res, err
	}
	if err = x.squash(ctx, req.Squash); err == nil && req.Export != nil {
		err = req.Export(ctx, x)
	}
	res.ID = cmp.Or(x.Made, x.ID())
	return res, err
}

// given is the value of a build argument, "" for none.
func given(v *string) string {
	if v == nil {
		return ""
	}
	return *v
}

// definition is what the display calls the source of the Dockerfile.
func definition(req *Request) string {
	switch {
	case req.Dockerfile == "-" || req.Context == "-":
		return "stdin"
	case req.Dockerfile == "":
		return "Dockerfile"
	}
	return req.Dockerfile
}

// load opens the context and reads the Dockerfile.
func (b *Builder) load(ctx context.Context, req *Request, j *journal) (_ *input, _ *dockerfile.File, err error) {
	remote, err := b.openRemote(ctx, req, j)
	if err != nil {
		return nil, nil, err
	}
	v := j.vertex("", "[internal] load build definition from "+definition(req))
	v.start()
	defer func() {
		if err != nil {
			v.end(Failed, "", err)
		} else {
			v.end(Done, "", nil)
		}
	}()
	in, err := b.openInput(ctx, req, remote)
	if err != nil {
		return nil, nil, err
	}
	file, err := dockerfile.Parse(in.name, in.source)
	if err != nil {
		return nil, nil, errors.Join(err, in.close())
	}
	in.vertex = v
	return in, file, nil
}

// all plans the target and what it needs.
func (p *planner) all(ctx context.Context) (*stage, error) {
	if err := p.prepare(); err != nil {
		return nil, err
	}
	target, err := p.target()
	if err != nil {
		return nil, err
	}
	if err := p.preload(ctx, target); err != nil {
		return nil, err
	}
	if err := p.plan(ctx, target); err != nil {
		return nil, err
	}
	p.stamp(target)
	return target, nil
}

// config makes the image's config, and its layers survive a power loss.
func (b *Builder) config(target *stage, out result, req *Request, epoch *time.Time, x *Export) ([]byte, error) {
	cfg := target.cfg.clone()
	if len(req.Labels) > 0 && cfg.image.Config.Labels == nil {
		cfg.image.Config.Labels = map[string]string{}
	}
	for k, v := range req.Labels {
		cfg.image.Config.Labels[k] = v
	}
	x.Image = cfg.assemble(out, epoch)
	// Cached layers too: the build that made them may have ended before it came to this. One lstat each when they are synced.
	if err := b.Layers.Sync(out.layers...); err != nil {
		return nil, err
	}
	return json.Marshal(x.Image)
}

// background runs f, which takes something down that nobody waits for, until finish.
func (b *Builder) background(f func() error) {
	b.after.Go(func() {
		if err := f(); err != nil {
			b.mu.Lock()
			b.errs = append(b.errs, err)
			b.mu.Unlock()
		}
	})
}

// finish waits for background work.
func (b *Builder) finish() error {
	b.after.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	err := errors.Join(b.errs...)
	b.errs = nil
	return err
}

// hashTo copies r to f and returns the sha256 of it and its length.
func hashTo(f *os.File, r io.Reader) (ocispec.Digest, int64, error) {
	h := sha256.New()
	n, err := copyBuffered(io.MultiWriter(f, h), r)
	return ocispec.FromHash(h), n, err
}
