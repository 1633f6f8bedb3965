{{/* The labels of an object of a component: dict "root" . "component" NAME. */}}
{{- define "snapmerge.labels" -}}
{{ include "snapmerge.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: snapmerge
{{- end }}

{{/* The labels by which a component's pods are found. */}}
{{- define "snapmerge.selector" -}}
app.kubernetes.io/name: snapmerge
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "snapmerge.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "snapmerge.driver" -}}
csi.snapmerge.io
{{- end }}

{{/* The directory of the CSI socket. */}}
{{- define "snapmerge.pluginDir" -}}
{{ .Values.kubeletDir }}/plugins/{{ include "snapmerge.driver" . }}
{{- end }}

{{/* What all pods have in common. They go where volumes can be; node plugin and
     keeper have to go together. */}}
{{- define "snapmerge.pod" -}}
enableServiceLinks: false
nodeSelector:
  kubernetes.io/os: linux
  {{- with .Values.nodeSelector }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A sidecar needs nothing but the CSI socket, which belongs to root, and the API. */}}
{{- define "snapmerge.sidecarSecurity" -}}
securityContext:
  runAsUser: 0
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
{{- end }}
