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
//	buildcache/mount/<hash>                         a cache mount's folder, and <hash>.lock for sharing=locked
//	<state>/build/<id>.lock                         flock: a RUN step that runs; see Settle
package build

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"conex/internal/disk"
	"conex/internal/dockerfile"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/network"
	"conex/internal/ocispec"
	box "conex/internal/runtime"

	"github.com/opencontainers/go-digest"
)

// Builder is what builds stand on. It may run several builds at a time.
type Builder struct {
	Root  *disk.Root
	State string
	// Layers claims what it makes: see layers.Store.Claiming.
	Layers *layers.Store
	Images *image.Store
	// Runtime runs RUN steps.
	Runtime box.Runtime
	// Networks connects RUN steps to the default bridge; nil leaves them with loopback alone.
	Networks *network.Manager
	// DNS and DNSSearch replace the host's name servers and search list, as in package config.
	DNS, DNSSearch []string
	// Base finds the image that a FROM or --from names, and gets it if it is missing, or in any case with pull. progress may be called
	// with counts of bytes.
	Base func(ctx context.Context, ref string, pull bool, progress func(current, total int64)) (image.Image, error)

	after sync.WaitGroup
	mu    sync.Mutex
	errs  []error
}

// Request says what to build. The zero value of each field is docker build's default.
type Request struct {
	// Context is a folder, or "-": a Dockerfile or a tar (plain or compressed) on Stdin.
	Context string
	Stdin   io.Reader
	// Dockerfile is the file's path, "-" for Stdin; "" is Dockerfile in the context.
	Dockerfile string
	// Tags are the references to give to the image.
	Tags []string
	// BuildArgs are --build-arg; a nil value is one that was given without a value and is not set in the environment.
	BuildArgs map[string]*string
	// Target is the stage to build, by name or number; "" is the last.
	Target string
	// NoCache runs every step; Pull asks the registry for every base image.
	NoCache, Pull bool
	// Labels are added to the image.
	Labels map[string]string
	// Platform is os/arch; only this machine's is possible.
	Platform string
	// Display receives events.
	Display Display
}

// Result is a finished build.
type Result struct {
	// ID is the image's.
	ID ocispec.Digest
	// Cached says that no step ran.
	Cached bool
	// Made are the layers of the steps that ran.
	Made []ocispec.Digest
}

// Build builds an image, records it and tags it. The caller holds a lease that Layers claims for, and Base for what it returns. The same input gives the same image id as long as the
// cache holds its steps. Steps that were done before a failure or cancellation stay in the cache; everything else is taken back. The error is
// a *StepError or *dockerfile.ParseError where a place in the Dockerfile is to blame.
func (b *Builder) Build(ctx context.Context, req Request) (res Result, err error) {
	defer func() { err = errors.Join(err, b.finish()) }()
	if err := Settle(ctx, b.State, b.Networks); err != nil {
		return res, err
	}
	c := &cache{b.Root, b.Layers}
	if err := c.clearLocks(); err != nil {
		return res, err
	}
	refs := make([]image.Reference, len(req.Tags))
	for i, t := range req.Tags {
		if refs[i], err = image.ParseReference(t); err != nil {
			return res, fmt.Errorf("invalid tag %q: %w", t, err)
		}
		if refs[i].Digest() != "" {
			return res, fmt.Errorf("invalid tag %q: refusing to create a tag with a digest reference", t)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	j := newJournal(req.Display)
	v := j.vertex("", "[internal] load build definition from "+definition(&req))
	v.start()
	in, file, err := b.load(ctx, &req)
	if err != nil {
		v.end(Failed, "", err)
		return res, err
	}
	v.end(Done, "", nil)
	defer func() { err = errors.Join(err, in.close()) }()
	for _, w := range file.Warnings {
		j.emit(Event{Kind: Warning, Text: w})
	}
	p := &planner{b: b, req: &req, file: file, in: in, journal: j, platform: platform()}
	defer func() {
		for _, d := range p.downloads {
			err = errors.Join(err, d.close())
		}
	}()
	target, err := p.all(ctx)
	if err != nil {
		return res, err
	}
	if names := p.unconsumed(); len(names) > 0 {
		j.emit(Event{Kind: Warning, Text: fmt.Sprintf("build arguments that no ARG of the Dockerfile takes: %s", strings.Join(names, ", "))})
	}
	s := newSolver(c, file, req.NoCache, cancel)
	out, err := s.solve(ctx, target.tip)
	for _, n := range p.nodes {
		switch {
		case n.vertex == nil:
		case err == nil:
			n.vertex.end(Cached, "", nil) // a hit made it needless; it has ended otherwise
		default:
			n.vertex.end(Canceled, "", nil)
		}
	}
	if v := p.contexts.v; v != nil && err != nil {
		v.end(Canceled, "", nil)
	}
	if in.view.stats != nil {
		err = errors.Join(err, in.view.stats.save())
	}
	if err != nil {
		return res, err
	}
	res.Cached, res.Made = len(s.made) == 0, s.made
	res.ID, err = b.export(ctx, j, s, target, out, refs, &req)
	return res, err
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

func (b *Builder) load(ctx context.Context, req *Request) (*input, *dockerfile.File, error) {
	in, err := openInput(ctx, b.Root, req)
	if err != nil {
		return nil, nil, err
	}
	file, err := dockerfile.Parse(in.name, in.source)
	if err != nil {
		return nil, nil, errors.Join(err, in.close())
	}
	return in, file, nil
}

// all plans the target and what it needs.
func (p *planner) all(ctx context.Context) (*stage, error) {
	if p.req.Platform != "" {
		if err := p.checkPlatform(p.req.Platform); err != nil {
			return nil, err
		}
	}
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
	return target, nil
}

// export writes the image.
func (b *Builder) export(ctx context.Context, j *journal, s *solver, target *stage, out result, refs []image.Reference, req *Request) (ocispec.Digest, error) {
	v := j.vertex("", "exporting to image")
	v.start()
	raw, err := b.record(ctx, s, target, out, req)
	var img image.Image
	if err == nil {
		img, err = b.Images.Add(ctx, raw, "", "")
	}
	if err != nil {
		v.end(Failed, "", err)
		return "", err
	}
	v.end(Done, string(img.ID), nil)
	for _, r := range refs {
		v := j.vertex("", "naming to "+r.String())
		v.start()
		if _, err := b.Images.AddTagged(ctx, raw, "", "", "", r); err != nil {
			v.end(Failed, "", err)
			return "", err
		}
		v.end(Done, "", nil)
	}
	return img.ID, nil
}

// record makes the image's config, and its layers survive a power loss.
func (b *Builder) record(ctx context.Context, s *solver, target *stage, out result, req *Request) ([]byte, error) {
	cfg := target.cfg.clone()
	if len(req.Labels) > 0 && cfg.image.Config.Labels == nil {
		cfg.image.Config.Labels = map[string]string{}
	}
	for k, v := range req.Labels {
		cfg.image.Config.Labels[k] = v
	}
	img := cfg.assemble(out)
	// The time of an image is that of its first build: an equal config finds it again.
	raw, err := json.Marshal(img)
	if err != nil {
		return nil, err
	}
	key := keyOf(byDefinition, kindConfig, raw, nil)
	rec, ok, err := s.cache.get(byDefinition, key)
	if err != nil {
		return nil, err
	}
	if !ok {
		if rec, err = firstBuild(ctx, s.cache, key); err != nil {
			return nil, err
		}
	}
	img.Created = &rec.Created
	for i := range img.History {
		if img.History[i].Created == nil {
			img.History[i].Created = img.Created
		}
	}
	if raw, err = json.Marshal(img); err != nil {
		return nil, err
	}
	// Cached layers too: the build that made them may have ended before it came to this. One lstat each when they are synced.
	if err := b.Layers.Sync(out.layers...); err != nil {
		return nil, err
	}
	return raw, nil
}

// firstBuild records now as the time of a config's first build; of several at once one is the first.
func firstBuild(ctx context.Context, c *cache, key string) (Record, error) {
	release, err := c.lock(ctx, key)
	if err != nil {
		return Record{}, err
	}
	defer release()
	rec, ok, err := c.get(byDefinition, key)
	if err != nil || ok {
		return rec, err
	}
	rec = Record{Key: key, Kind: kindConfig, Created: time.Now().UTC()}
	return rec, c.put(byDefinition, rec)
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

// platform is this machine's.
func platform() ocispec.Platform {
	p := ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	if p.Architecture == "arm64" {
		p.Variant = "v8"
	}
	return p
}

// hashTo copies r to f and returns the sha256 of it and its length.
func hashTo(f *os.File, r io.Reader) (ocispec.Digest, int64, error) {
	h := sha256.New()
	n, err := copyBuffered(io.MultiWriter(f, h), r)
	return digest.NewDigest(digest.SHA256, h), n, err
}
