package engine

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"conex/internal/image"

	apii "github.com/moby/moby/api/types/image"
)

// ImagesRequest selects images.
type ImagesRequest struct {
	// All includes intermediate images; conex keeps none, so it changes nothing.
	All bool
	// Filters are Docker's: dangling, label, before, since, until, reference. Values of label, before, since and until must all
	// hold, of the others one.
	Filters map[string][]string
	// Reference is one more value for the filter reference: the argument of `images`.
	Reference string
}

// ListImages lists images, newest first. Of an image that the filter reference selects by some of its names only these are shown.
// An error that is image.ErrDamaged comes with all images but the damaged ones.
func (e *Engine) ListImages(ctx context.Context, req ImagesRequest) ([]apii.Summary, error) {
	images, err := e.Images()
	if err != nil {
		return nil, err
	}
	f, err := newImageFilter(images, req)
	if err != nil {
		return nil, err
	}
	list, damaged := images.List()
	if damaged != nil && !errors.Is(damaged, image.ErrDamaged) {
		return nil, damaged
	}
	var selected []image.Image
	for _, img := range list {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		ok, err := f.match(&img)
		if err != nil {
			return nil, err
		}
		if ok {
			selected = append(selected, img)
		}
	}
	sizes, err := images.Sizes(selected)
	if err != nil {
		return nil, err
	}
	sums := []apii.Summary{}
	for i, img := range selected {
		sums = append(sums, apii.Summary{
			ID: string(img.ID), Created: unixSeconds(img.Created), Size: sizes[i], Labels: img.Config.Config.Labels,
			RepoTags: notNil(img.RepoTags), RepoDigests: notNil(img.RepoDigests),
			Containers: -1, SharedSize: -1, // not counted, in Docker's way
		})
	}
	return sums, damaged
}

// notNil makes an empty list [] in JSON, as Docker's API has it.
func notNil(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

// imageFilter is a request's filters, checked and resolved.
type imageFilter struct {
	dangling *bool
	labels   []string
	patterns []string
	// newer and older bound the time of creation, exclusively.
	newer, older []time.Time
}

func newImageFilter(images *image.Store, req ImagesRequest) (*imageFilter, error) {
	f := &imageFilter{}
	if req.Reference != "" {
		f.patterns = append(f.patterns, req.Reference)
	}
	for key, vals := range req.Filters {
		for _, val := range vals {
			if err := f.add(images, key, val); err != nil {
				return nil, err
			}
		}
	}
	for _, p := range f.patterns {
		if _, err := path.Match(p, ""); err != nil {
			return nil, invalid("invalid filter 'reference=%s': %w", p, err)
		}
	}
	return f, nil
}

func (f *imageFilter) add(images *image.Store, key, val string) error {
	switch key {
	case "dangling":
		b, err := strconv.ParseBool(val)
		if err != nil {
			return invalid("invalid filter 'dangling=%s': want true or false", val)
		}
		f.dangling = &b
	case "label":
		f.labels = append(f.labels, val)
	case "reference":
		f.patterns = append(f.patterns, val)
	case "before", "since":
		img, err := images.Resolve(val)
		if err != nil {
			return classify(err)
		}
		if key == "before" {
			f.older = append(f.older, img.Created)
		} else {
			f.newer = append(f.newer, img.Created)
		}
	case "until":
		t, err := parseUntil(val, time.Now())
		if err != nil {
			return invalid("invalid filter 'until=%s': %w", val, err)
		}
		f.older = append(f.older, t)
	default:
		return invalid("invalid filter '%s'", key)
	}
	return nil
}

// parseUntil reads a point in time as Docker's filters have it: a duration before now, seconds since 1970, or a date.
func parseUntil(s string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	if sec, err := strconv.ParseFloat(s, 64); err == nil && math.Abs(sec) < math.MaxInt64/1e9 {
		return time.Unix(0, int64(sec*1e9)), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("neither a duration nor a time")
}

// match reports whether img is selected, and takes the names off it that the filter reference does not select.
func (f *imageFilter) match(img *image.Image) (bool, error) {
	if f.dangling != nil && *f.dangling != (len(img.RepoTags) == 0) {
		// As in Docker, an image that has a name by digest only is shown by dangling=true and by dangling=false.
		if *f.dangling || len(img.RepoDigests) == 0 {
			return false, nil
		}
	}
	for _, t := range f.older {
		if !img.Created.Before(t) {
			return false, nil
		}
	}
	for _, t := range f.newer {
		if !img.Created.After(t) {
			return false, nil
		}
	}
	for _, l := range f.labels {
		key, want, hasValue := strings.Cut(l, "=")
		got, ok := img.Config.Config.Labels[key]
		if !ok || hasValue && got != want {
			return false, nil
		}
	}
	if len(f.patterns) == 0 {
		return true, nil
	}
	for _, list := range []*[]string{&img.RepoTags, &img.RepoDigests} {
		kept := slices.Clone(*list)
		var err error
		kept = slices.DeleteFunc(kept, func(name string) bool {
			ok, merr := matchesAny(f.patterns, name)
			if merr != nil {
				err = merr
			}
			return !ok
		})
		if err != nil {
			return false, err
		}
		*list = kept
	}
	return len(img.RepoTags)+len(img.RepoDigests) > 0, nil
}

// matchesAny reports whether a familiar reference fits one of the patterns, with or without its tag. A pattern that is itself a
// reference also fits in its other spellings: docker.io/library/nginx for nginx.
func matchesAny(patterns []string, name string) (bool, error) {
	ref, err := image.ParseReference(name)
	if err != nil {
		return false, err
	}
	for _, p := range patterns {
		for _, form := range []string{ref.Familiar(), ref.FamiliarName()} {
			if ok, err := path.Match(p, form); err != nil || ok {
				return ok, err
			}
		}
		pr, err := image.ParseReference(p)
		if err != nil {
			continue // a pattern, no reference
		}
		// Without a tag of its own a pattern means every tag.
		bare := !strings.HasSuffix(p, ":"+pr.Tag()) && pr.Digest() == ""
		if pr == ref || bare && pr.Name() == ref.Name() {
			return true, nil
		}
	}
	return false, nil
}

// stillThere looks again whether images are there, once a lease on what is theirs is held: who removed one between the look and the lease
// may have removed its layers too.
func stillThere(images *image.Store, imgs []image.Image) error {
	for _, img := range imgs {
		if _, err := images.Get(img.ID); err != nil {
			return err
		}
	}
	return nil
}
