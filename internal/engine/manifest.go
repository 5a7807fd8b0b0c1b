package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"conex/internal/image"
	"conex/internal/ocispec"
	"conex/internal/registry"
)

// ManifestCreateRequest asks for a manifest list of images that lie in a registry.
type ManifestCreateRequest struct {
	List   string
	Images []string
	// Amend adds to a list that is there.
	Amend bool
	// Insecure allows the registry to be asked without TLS, or with a certificate that nobody vouches for.
	Insecure bool
}

// ManifestCreate makes or extends a manifest list here; nothing is sent. It returns the list's full name.
func (e *Engine) ManifestCreate(ctx context.Context, req ManifestCreateRequest) (string, error) {
	ref, err := listReference(req.List)
	if err != nil {
		return "", err
	}
	lists := image.OpenLists(e.root)
	old, err := lists.Get(ref)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err == nil && !req.Amend {
		return "", conflict("refusing to amend an existing manifest list with no --amend flag")
	}
	client := e.manifestClient(req.Insecure)
	defer client.Close()
	var made []image.ListEntry
	for _, name := range req.Images {
		img, err := image.ParseReference(name)
		if err != nil {
			return "", classify(err)
		}
		if old.Entry(img) >= 0 {
			continue // with what was annotated
		}
		entry, err := fetchEntry(ctx, client, img)
		if err != nil {
			return "", err
		}
		made = append(made, entry)
	}
	return ref.String(), lists.Update(ref, func(l *image.List, exists bool) error {
		if exists && !req.Amend {
			return conflict("refusing to amend an existing manifest list with no --amend flag")
		}
		for _, entry := range made {
			same := func(e image.ListEntry) bool { return e.Ref == entry.Ref }
			if !slices.ContainsFunc(l.Entries, same) {
				l.Entries = append(l.Entries, entry)
			}
		}
		return nil
	})
}

func listReference(name string) (image.Reference, error) {
	ref, err := image.ParseReference(name)
	if err != nil {
		return ref, classify(err)
	}
	if ref.Digest() != "" {
		return ref, invalid("a manifest list has a tag for a name, not a digest: %s", name)
	}
	return ref, nil
}

func (e *Engine) manifestClient(insecure bool) *registry.Client {
	o := e.registryOptions()
	o.Insecure = insecure
	return registry.New(o)
}

func noManifest(ref image.Reference) error {
	return &kindError{ErrNotFound, fmt.Errorf("no such manifest: %s", ref.Familiar())}
}

// remoteManifest fetches what a reference leads to.
func remoteManifest(ctx context.Context, c *registry.Client, ref image.Reference) (ocispec.Descriptor, []byte, registry.Endpoint, error) {
	name := ref.Tag()
	if ref.Digest() != "" {
		name = string(ref.Digest())
	}
	desc, raw, ep, err := c.Resolve(ctx, ref.Domain(), ref.Path(), name)
	if errors.Is(err, registry.ErrManifestUnknown) || errors.Is(err, registry.ErrNameUnknown) {
		return desc, nil, ep, noManifest(ref)
	}
	if err != nil {
		return desc, nil, ep, fmt.Errorf("manifest of %s: %w", ref.Familiar(), err)
	}
	return desc, raw, ep, nil
}

// fetchEntry makes a list's entry of an image: its manifest, and the platform that its config says.
func fetchEntry(ctx context.Context, c *registry.Client, ref image.Reference) (image.ListEntry, error) {
	desc, raw, ep, err := remoteManifest(ctx, c, ref)
	if err != nil {
		return image.ListEntry{}, err
	}
	if registry.IsIndex(desc.MediaType) {
		return image.ListEntry{}, invalid("%s is a manifest list: name its images instead, by digest", ref.Familiar())
	}
	desc.Platform, err = remotePlatform(ctx, c, ep, ref, raw)
	return image.ListEntry{Ref: ref.String(), Descriptor: desc, Raw: raw}, err
}

func remotePlatform(ctx context.Context, c *registry.Client, ep registry.Endpoint, ref image.Reference, raw []byte) (*ocispec.Platform, error) {
	m, err := registry.DecodeManifest(raw)
	if err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", ref.Familiar(), err)
	}
	if m.Config.Size > image.MaxConfig {
		return nil, fmt.Errorf("config of %s has %d bytes, at most %d are allowed", ref.Familiar(), m.Config.Size, image.MaxConfig)
	}
	rc, err := c.Blob(ctx, ep, ref.Path(), m.Config)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	conf, err := io.ReadAll(rc)
	if err != nil {
		return nil, err
	}
	var p ocispec.Platform
	if err := json.Unmarshal(conf, &p); err != nil {
		return nil, fmt.Errorf("config of %s is not as it should be: %w", ref.Familiar(), err)
	}
	return &p, nil
}

// ManifestAnnotation is what to say of an image in a list; empty fields leave what is there.
type ManifestAnnotation struct {
	OS, Arch, Variant, OSVersion string
	OSFeatures                   []string
}

// ManifestAnnotate changes the platform that a list says of an image.
func (e *Engine) ManifestAnnotate(_ context.Context, list, img string, a ManifestAnnotation) error {
	ref, err := listReference(list)
	if err != nil {
		return err
	}
	of, err := image.ParseReference(img)
	if err != nil {
		return classify(err)
	}
	return image.OpenLists(e.root).Update(ref, func(l *image.List, _ bool) error {
		i := l.Entry(of)
		if i < 0 {
			return &kindError{ErrNotFound, fmt.Errorf("manifest for image %s does not exist in %s", of.Familiar(), ref.Familiar())}
		}
		p := ocispec.Platform{}
		if l.Entries[i].Descriptor.Platform != nil {
			p = *l.Entries[i].Descriptor.Platform
		}
		for _, f := range []struct {
			dst *string
			val string
		}{{&p.OS, a.OS}, {&p.Architecture, a.Arch}, {&p.Variant, a.Variant}, {&p.OSVersion, a.OSVersion}} {
			if f.val != "" {
				*f.dst = f.val
			}
		}
		p.OSFeatures = append(p.OSFeatures, a.OSFeatures...)
		if !registry.KnownPlatform(p.OS, p.Architecture) {
			return invalid("manifest entry for image has unsupported os/arch combination: %s/%s", a.OS, a.Arch)
		}
		l.Entries[i].Descriptor.Platform = &p
		return nil
	})
}

// listEntry and listDocument are an index in the order and form in which Docker writes it, so that the same list has the same digest.
type listEntry struct {
	MediaType string            `json:"mediaType"`
	Size      int64             `json:"size"`
	Digest    ocispec.Digest    `json:"digest"`
	Platform  *ocispec.Platform `json:"platform,omitempty"`
}

type listDocument struct {
	SchemaVersion int         `json:"schemaVersion"`
	MediaType     string      `json:"mediaType"`
	Manifests     []listEntry `json:"manifests"`
}

// encodeList returns a list as it is pushed: an OCI index if one of its images is OCI's, else Docker's list.
func encodeList(l image.List) (mediaType string, raw []byte, err error) {
	doc := listDocument{SchemaVersion: 2, MediaType: ocispec.MediaTypeDockerManifestList, Manifests: []listEntry{}}
	for _, e := range l.Entries {
		if e.Descriptor.MediaType == ocispec.MediaTypeImageManifest {
			doc.MediaType = ocispec.MediaTypeImageIndex
		}
		doc.Manifests = append(doc.Manifests, listEntry{e.Descriptor.MediaType, e.Descriptor.Size, e.Descriptor.Digest, e.Descriptor.Platform})
	}
	raw, err = json.MarshalIndent(doc, "", "   ")
	return doc.MediaType, raw, err
}

// ManifestDetail is what inspect --verbose says of an image.
type ManifestDetail struct {
	Ref              string
	Descriptor       ocispec.Descriptor
	Raw              []byte
	SchemaV2Manifest json.RawMessage `json:",omitempty"`
	OCIManifest      json.RawMessage `json:",omitempty"`
}

func detail(ref string, desc ocispec.Descriptor, raw []byte) ManifestDetail {
	d := ManifestDetail{Ref: ref, Descriptor: desc, Raw: raw}
	if desc.MediaType == ocispec.MediaTypeImageManifest {
		d.OCIManifest = raw
	} else {
		d.SchemaV2Manifest = raw
	}
	return d
}

// ManifestInspectRequest asks for a manifest or list.
type ManifestInspectRequest struct {
	// List is the local list that Name is an image of; "" when Name itself is a local list or lies in a registry.
	List, Name        string
	Verbose, Insecure bool
}

// ManifestInspect returns the JSON that Docker prints for a manifest or list, without a newline at its end. A list that is here comes before one that a
// registry has.
func (e *Engine) ManifestInspect(ctx context.Context, req ManifestInspectRequest) ([]byte, error) {
	ref, err := image.ParseReference(req.Name)
	if err != nil {
		return nil, classify(err)
	}
	lists := image.OpenLists(e.root)
	if req.List != "" {
		lref, err := listReference(req.List)
		if err != nil {
			return nil, err
		}
		l, err := lists.Get(lref)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		i := l.Entry(ref)
		if i < 0 {
			return nil, noManifest(ref)
		}
		return inspected(l.Entries[i].Ref, l.Entries[i].Descriptor, l.Entries[i].Raw, req.Verbose)
	}
	l, err := lists.Get(ref)
	switch {
	case err == nil && req.Verbose:
		var all []ManifestDetail
		for _, e := range l.Entries {
			all = append(all, detail(e.Ref, e.Descriptor, e.Raw))
		}
		return json.MarshalIndent(all, "", "\t")
	case err == nil:
		_, raw, err := encodeList(l)
		return raw, err
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	client := e.manifestClient(req.Insecure)
	defer client.Close()
	desc, raw, ep, err := remoteManifest(ctx, client, ref)
	if err != nil {
		return nil, err
	}
	if !registry.IsIndex(desc.MediaType) {
		if req.Verbose {
			if desc.Platform, err = remotePlatform(ctx, client, ep, ref, raw); err != nil {
				return nil, err
			}
		}
		return inspected(ref.String(), desc, raw, req.Verbose)
	}
	if !req.Verbose {
		return indented(raw, "   ")
	}
	var idx ocispec.Index
	if err := json.Unmarshal(raw, &idx); err != nil {
		return nil, fmt.Errorf("manifest list %s is not as it should be: %w", ref.Familiar(), err)
	}
	if len(idx.Manifests) > maxVerbose {
		return nil, fmt.Errorf("%s lists %d manifests, more than the %d that --verbose fetches", ref.Familiar(), len(idx.Manifests), maxVerbose)
	}
	var all []ManifestDetail
	for _, d := range idx.Manifests {
		b, err := client.Manifest(ctx, ep, ref.Path(), d)
		if err != nil {
			return nil, err
		}
		all = append(all, detail(ref.String()+"@"+string(d.Digest), d, b))
	}
	return json.MarshalIndent(all, "", "\t")
}

// maxVerbose bounds how many manifests inspect --verbose fetches.
const maxVerbose = 200

func inspected(ref string, desc ocispec.Descriptor, raw []byte, verbose bool) ([]byte, error) {
	if verbose {
		return json.MarshalIndent(detail(ref, desc, raw), "", "\t")
	}
	return indented(raw, "\t")
}

func indented(raw []byte, indent string) ([]byte, error) {
	var b bytes.Buffer
	err := json.Indent(&b, raw, "", indent)
	return b.Bytes(), err
}

// ManifestPush sends a list, after what its images lack in its repository: blobs are mounted from the images' own repositories, or
// copied. told receives a line for each image. purge forgets the list here. A nil error promises that the whole list can be pulled.
func (e *Engine) ManifestPush(ctx context.Context, list string, purge, insecure bool, told func(string)) (ocispec.Digest, error) {
	ref, err := listReference(list)
	if err != nil {
		return "", err
	}
	lists := image.OpenLists(e.root)
	l, err := lists.Get(ref)
	if errors.Is(err, fs.ErrNotExist) {
		return "", &kindError{ErrNotFound, fmt.Errorf("No such manifest: %s", ref.Familiar())} //nolint:staticcheck // Docker's words
	}
	if err != nil {
		return "", err
	}
	client := e.manifestClient(insecure)
	defer client.Close()
	ep, err := client.PushEndpoint(ctx, ref.Domain(), ref.Path())
	if err != nil {
		return "", err
	}
	for _, entry := range l.Entries {
		from, err := image.ParseReference(entry.Ref)
		if err != nil {
			return "", classify(err)
		}
		if from.Domain() != ref.Domain() {
			return "", invalid("cannot use source images from a different registry than the target image: %s != %s", from.Domain(), ref.Domain())
		}
		if from.Path() != ref.Path() {
			if err := copyBlobs(ctx, client, ep, from.Path(), ref.Path(), entry.Raw); err != nil {
				return "", fmt.Errorf("push %s: %w", ref.Familiar(), err)
			}
		}
		d, err := client.PutManifest(ctx, ep, ref.Path(), string(entry.Descriptor.Digest), entry.Descriptor.MediaType, entry.Raw)
		if err != nil {
			return "", fmt.Errorf("push %s: %w", ref.Familiar(), err)
		}
		told(fmt.Sprintf("Pushed ref %s with digest: %s", ref.WithDigest(d), d))
	}
	mediaType, raw, err := encodeList(l)
	if err != nil {
		return "", err
	}
	d, err := client.PutManifest(ctx, ep, ref.Path(), ref.Tag(), mediaType, raw)
	if err != nil {
		return "", fmt.Errorf("push %s: %w", ref.Familiar(), err)
	}
	if purge {
		if err := lists.Remove(ref); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return d, nil
}

// copyBlobs makes a repository have the blobs of an image of another one.
func copyBlobs(ctx context.Context, c *registry.Client, ep registry.Endpoint, from, to string, raw []byte) error {
	m, err := registry.DecodeManifest(raw)
	if err != nil {
		return err
	}
	for _, d := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		if _, ok, err := c.HasBlob(ctx, ep, to, d.Digest); err != nil || ok {
			if err != nil {
				return err
			}
			continue
		}
		if ok, err := c.MountBlob(ctx, ep, to, d.Digest, from); err != nil || ok {
			if err != nil {
				return err
			}
			continue
		}
		up := registry.Upload{Digest: d.Digest, Size: d.Size, Open: func() (io.ReadCloser, error) { return c.Blob(ctx, ep, from, d) }}
		if err := c.PutBlob(ctx, ep, to, up); err != nil {
			return err
		}
	}
	return nil
}

// ManifestRemove forgets lists that are here. It goes on after an error.
func (e *Engine) ManifestRemove(_ context.Context, names ...string) error {
	var errs []error
	for _, name := range names {
		ref, err := listReference(name)
		if err == nil {
			if err = image.OpenLists(e.root).Remove(ref); errors.Is(err, fs.ErrNotExist) {
				err = &kindError{ErrNotFound, fmt.Errorf("No such manifest: %s", ref.Familiar())} //nolint:staticcheck // Docker's words
			}
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
