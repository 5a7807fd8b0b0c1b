package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"conex/internal/build"
	"conex/internal/collect"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/registry"
)

// buildOutput does with an image that was built what its request asks for.
type buildOutput struct {
	e       *Engine
	req     *BuildRequest
	images  *image.Store
	layers  *layers.Store  // claims what it makes for lease
	lease   *collect.Lease // the build's
	builder *build.Builder
	outputs []*BuildOutput
	file    func(dest string, write func(io.Writer) error) error

	metadata map[string]any
	inline   bool // the image's config gets the cache of its steps

	mu     sync.Mutex
	client *registry.Client // of caches to read; nil before the first
}

// buildOutput checks what a request wants done with the image, before anything is built. As in buildx an output without names has the
// tags; without any output the image goes into the store.
func (e *Engine) buildOutput(req *BuildRequest) (*buildOutput, error) {
	images, err := e.Images()
	if err != nil {
		return nil, err
	}
	o := &buildOutput{e: e, req: req, images: images, file: req.File, metadata: map[string]any{}}
	var tags []image.Reference
	for _, t := range req.Tags {
		ref, err := image.ParseReference(t)
		if err != nil {
			return nil, fmt.Errorf("invalid tag %q: %w", t, err)
		}
		if ref.Digest() != "" {
			return nil, fmt.Errorf("invalid tag %q: refusing to create a tag with a digest reference", t)
		}
		tags = append(tags, ref)
	}
	if req.Verify && (req.Context == "-" || req.Dockerfile == "-") {
		return nil, invalid("--verify reads the context twice, which standard input can't be")
	}
	for _, out := range req.Outputs {
		c := out
		o.outputs = append(o.outputs, &c)
	}
	if err := o.defaults(); err != nil {
		return nil, err
	}
	stdout := 0
	for _, out := range o.outputs {
		if out.isImage() && len(tags) > 0 {
			out.Names = tags
		}
		if out.Push && len(out.Names) == 0 {
			return nil, invalid("tag is needed when pushing to registry")
		}
		if out.Dest == "-" {
			stdout++
		}
		if err := o.destination(out); err != nil {
			return nil, err
		}
	}
	if stdout > 1 {
		return nil, invalid("only one output can go to standard output")
	}
	return o, o.caches()
}

// names are those of the image in full.
func (o *buildOutput) names() []string {
	var names []string
	for _, out := range o.outputs {
		for _, ref := range out.Names {
			if n := ref.String(); !slices.Contains(names, n) {
				names = append(names, n)
			}
		}
	}
	return names
}

// defaults adds the outputs that --push and --load stand for.
func (o *buildOutput) defaults() error {
	find := func(match func(*BuildOutput) bool) bool { return slices.ContainsFunc(o.outputs, match) }
	if o.req.Push {
		for _, out := range o.outputs {
			if out.Type == OutputImage {
				out.Push = true
			}
		}
		if !find(func(out *BuildOutput) bool { return out.Push }) {
			out, err := ParseBuildOutput("type=image,push=true")
			if err != nil {
				return err
			}
			o.outputs = append(o.outputs, &out)
		}
	}
	if (o.req.Load || len(o.outputs) == 0) && !find((*BuildOutput).stored) {
		out, err := ParseBuildOutput("type=image")
		if err != nil {
			return err
		}
		o.outputs = append(o.outputs, &out)
	}
	for _, a := range o.req.Annotations {
		if !find((*BuildOutput).isImage) {
			return invalid("--annotation: none of the outputs is an image")
		}
		for _, out := range o.outputs {
			if !out.isImage() {
				continue
			}
			if err := out.AddAnnotation(a); err != nil {
				return err
			}
		}
	}
	return nil
}

// destination looks at an output's file or folder before anything is built for it.
func (o *buildOutput) destination(out *BuildOutput) error {
	if out.Dest == "" {
		return nil
	}
	if o.file == nil {
		return invalid("type=%s: there is nothing to write to", out.Type)
	}
	st, err := os.Stat(out.Dest)
	switch folder := out.Type == OutputLocal || out.Folder; {
	case out.Dest == "-" || errors.Is(err, os.ErrNotExist):
	case err != nil:
		return err
	case folder && !st.IsDir():
		return invalid("destination directory %s is a file", out.Dest)
	case !folder && st.IsDir():
		return invalid("destination file %s is a directory", out.Dest)
	}
	return nil
}

// export gives the result to every output.
func (o *buildOutput) export(ctx context.Context, x *build.Export) error {
	first := x
	if o.inline {
		if err := x.Inline(ctx); err != nil {
			return err
		}
	}
	rewritten, err := o.rewrite(ctx, x)
	if err != nil {
		return err
	}
	for _, out := range o.outputs {
		x := x
		if out.Rewrite {
			x = rewritten
		}
		switch {
		case out.Type == OutputLocal:
			err = o.folder(ctx, x, out)
		case out.Type == OutputTar:
			err = o.tarball(ctx, x, out)
		case out.Type == OutputOCI, out.Type == OutputDocker && out.Dest != "":
			err = o.archived(ctx, x, out)
		case out.Type != OutputNothing:
			err = o.image(ctx, x, out)
		}
		if err != nil {
			return err
		}
		if out.isImage() && first.Made == "" {
			first.Made = x.ID()
		}
	}
	if err := o.exportCaches(ctx, x); err != nil {
		return err
	}
	if o.req.Verify {
		return o.verify(ctx, x, rewritten)
	}
	return nil
}

// rewrite sets times to SOURCE_DATE_EPOCH, if an output asks for it.
func (o *buildOutput) rewrite(ctx context.Context, x *build.Export) (*build.Export, error) {
	if !slices.ContainsFunc(o.outputs, func(out *BuildOutput) bool { return out.Rewrite }) {
		return nil, nil
	}
	if x.Epoch == nil {
		return nil, invalid("rewrite-timestamp needs SOURCE_DATE_EPOCH, in the environment or as a --build-arg")
	}
	return x.Rewritten(ctx)
}
