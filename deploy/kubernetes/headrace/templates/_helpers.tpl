{{/* What every object is called after. A CronJob's name has 52 characters at most. */}}
{{- define "headrace.name" -}}
{{- $name := .Release.Name }}
{{- if not (contains "headrace" $name) }}{{ $name = printf "%s-headrace" $name }}{{ end }}
{{- $name | trunc 36 | trimSuffix "-" }}
{{- end }}

{{/* Takes (dict "root" $ "component" NAME), as all below; metadata also a "name" that is not the component's. */}}
{{- define "headrace.selector" -}}
app.kubernetes.io/name: headrace
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "headrace.metadata" -}}
name: {{ include "headrace.name" .root }}-{{ default .component .name }}
labels:
  {{- include "headrace.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .root.Release.Service }}
  helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* The metadata of a pod: it is replaced where a file of the feature repository changes. */}}
{{- define "headrace.podMetadata" -}}
labels:
  {{- include "headrace.selector" . | nindent 2 }}
{{- with .root.Values.featureRepository.files }}
annotations:
  checksum/feature-repository: {{ . | toJson | sha256sum }}
{{- end }}
{{- end }}

{{/*
What the pods have in common. Links to services are off because they would be variables HEADRACE_…, which are settings.
*/}}
{{- define "headrace.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .root.Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "headrace.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Of the deployments with more than one pod. */}}
{{- define "headrace.spread" -}}
topologySpreadConstraints:
  {{- range $key := list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
  - topologyKey: {{ $key }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "headrace.selector" $ | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}

{{- define "headrace.image" -}}
image: {{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
imagePullPolicy: {{ .pullPolicy }}
{{- end }}

{{/* What our own processes have in common beside the pod's part. */}}
{{- define "headrace.ours" -}}
{{- $values := .root.Values }}
{{- include "headrace.image" (dict
    "repository" $values.image.repository
    "tag" (default .root.Chart.AppVersion $values.image.tag)
    "digest" $values.image.digest
    "pullPolicy" $values.image.pullPolicy) }}
{{ include "headrace.container" . }}
env:
  - {name: HEADRACE_BROKER, value: {{ required "broker: expected host:port of Kafka, several separated by commas" $values.broker | quote }}}
  - {name: HEADRACE_FEATURE_REPO, value: /srv/repository}
  - {name: HEADRACE_SECRETS_DIR, value: /srv/secrets}
  {{- with $values.sourceUrl }}
  - {name: HEADRACE_SOURCE_URL, value: {{ quote . }}}
  {{- end }}
  {{- with $values.reports.url }}
  - {name: HEADRACE_REPORT_URL, value: {{ quote . }}}
  {{- end }}
  {{- if eq .component "worker" }}
  - {name: HEADRACE_WEB_HOST, value: 0.0.0.0}
  {{- end }}
  {{- range $name, $value := $values.settings }}
  - {name: {{ $name }}, value: {{ quote $value }}}
  {{- end }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  {{- if ne .component "apply" }}
  - {name: data, mountPath: /srv/data}
  {{- end }}
  {{- if eq .component "batch" }}
  - {name: locks, mountPath: /srv/.luigi-locks}
  {{- end }}
  {{- if $values.secrets }}
  - {name: secrets, mountPath: /srv/secrets, readOnly: true}
  {{- end }}
  {{- range $file, $content := $values.featureRepository.files }}
  - {name: feature-repository, mountPath: {{ printf "/srv/repository/%s" $file | quote }}, subPath: {{ quote $file }}, readOnly: true}
  {{- end }}
{{- end }}

{{- define "headrace.volumes" -}}
{{- $values := .root.Values }}
volumes:
  - name: tmp
    emptyDir: {}
  {{- if ne .component "apply" }}
  - name: data
    persistentVolumeClaim:
      claimName: {{ default (printf "%s-data" (include "headrace.name" .root)) $values.persistence.existingClaim }}
  {{- end }}
  {{- if eq .component "batch" }}
  - name: locks
    emptyDir: {}
  {{- end }}
  {{- with $values.secrets }}
  # Not /run/secrets: clouds mount their tokens below it, and could not into a volume that is read-only.
  - name: secrets
    projected:
      defaultMode: 0440
      sources:
        {{- range . }}
        - secret: {name: {{ . }}}
        {{- end }}
  {{- end }}
  {{- if $values.featureRepository.files }}
  - name: feature-repository
    configMap:
      name: {{ include "headrace.name" .root }}-{{ ternary "apply" "repository" (eq .component "apply") }}
  {{- end }}
{{- end }}
